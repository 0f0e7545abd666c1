"""llama.cpp loads our GGUF files, predicts as well as the trained model, and cuts text into the same tokens.

Not in the normal suite: llama-cpp-python has no wheel, and install.sh builds it. llama.cpp rounds activations
to 8 bits, so logits differ by more than the files do; perplexity has to agree within 1 %.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_models
import made_tokenizers
import numpy as np
import pytest
import torch
from gguf_models import CASES, Case
from packed_models import (
    open_model,
    packed_blocks,
    rounded_heads,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from table import Tried

from engine.export.layout import form_of
from eqat_tui.views.result import loading_snippet

if place := os.environ.get("EQAT_LLAMA_CPP"):  # a folder that has it, beside an environment that has not
    import sys

    sys.path.append(place)
llama_cpp = pytest.importorskip("llama_cpp", reason="run by `make interop` in an environment of its own")

LENGTH = 200
QUIET = llama_cpp.llama_log_callback(lambda level, text, user: None)
TOKENIZERS = made_tokenizers.every()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))


def written(place: Path, case: Case, tokenizer: Any = None, **changes: Any) -> tuple[Path, Any, Any, Any]:
    """The file of a model with random integers, and the model."""
    folder = save_model(place / "fp", case.model_type, **case.changes, **changes)
    if tokenizer is not None:
        for old in folder.glob("tokenizer*"):
            old.unlink()
        tokenizer.save_pretrained(folder)
    source, lm = open_model(folder)
    blocks, form = packed_blocks(lm, case.bits, case.group, case.symmetric, case.fixed), form_of("gguf")
    form.check(lm, torch.bfloat16)
    result = write(place / "out", lm, source, blocks.__getitem__, layout=form)
    return result.path / result.files[0], source, lm, blocks


@pytest.fixture
def opened() -> Iterator[Any]:
    made: list[Any] = []

    def load(file: Path, **options: Any) -> Any:
        made.append(llama_cpp.Llama(str(file), n_threads=1, verbose=False, **options))
        return made[-1]

    yield load
    for model in made:
        model.close()


def perplexity(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:]).exp())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("bits", "fixed"), [(8, False), (4, False), (4, True)])
def test_llama_cpp_computes_with_a_quantized_embedding_and_head(
    bits: int, fixed: bool, tied: bool, tmp_path: Path, opened: Any
) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", tie_word_embeddings=tied))
    blocks, heads = packed_blocks(lm, 3, 64), rounded_heads(lm, bits, 64, fixed)
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=form_of("gguf"), heads=heads)
    ids = some_ids(1, LENGTH)
    model = opened(result.path / result.files[0], n_ctx=256, n_batch=256, logits_all=True)
    model.eval(ids[0].tolist())
    have = torch.tensor(np.array(model.scores[:LENGTH]))
    want = trained_logits(lm, blocks, ids, heads=heads)[0]
    assert perplexity(have, ids[0]) == pytest.approx(perplexity(want, ids[0]), rel=0.01)
    assert (have - want).abs().mean() < 0.2 * want.std()


@pytest.mark.parametrize("case", CASES, ids=gguf_models.NAMES)
def test_llama_cpp_predicts_as_the_trained_model(
    case: Case, tmp_path: Path, opened: Any, tried: list[Tried]
) -> None:
    file, _, lm, blocks = written(tmp_path, case)
    ids = some_ids(1, LENGTH)
    model = opened(file, n_ctx=256, n_batch=256, logits_all=True)
    model.eval(ids[0].tolist())
    have, want = torch.tensor(np.array(model.scores[:LENGTH])), trained_logits(lm, blocks, ids)[0]
    assert perplexity(have, ids[0]) == pytest.approx(perplexity(want, ids[0]), rel=0.01)
    assert (have - want).abs().mean() < 0.2 * want.std()
    best = want.topk(2).values
    lead = best[:, 0] - best[:, 1]
    clear = lead >= lead.quantile(0.75)  # a random model is mostly undecided
    agree = (have.argmax(-1) == want.argmax(-1))[clear].float().mean().item()
    assert agree >= 0.9
    tried.append(
        Tried(
            format=f"gguf {case.kind}",
            model=case.model_type,
            bits=case.bits,
            group_size=case.group,
            symmetric=case.symmetric,
            loader=f"llama-cpp-python {llama_cpp.__version__}",
            weights_equal=False,
            agree=agree,
            worst=((have - want).abs().max() / want.std()).item(),
        )
    )


def test_the_lines_that_screen_and_card_show_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, lm = open_model(save_model(tmp_path / "fp"))
    blocks = packed_blocks(lm, 4, 64)
    result = write(tmp_path / "an export", lm, source, blocks.__getitem__, layout=form_of("gguf"))
    card = (result.path / "README.md").read_text().partition("## Loading")[2]
    (shown,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(result.path)  # where whoever reads the card has its file
    for lines in (loading_snippet(result.path, "gguf"), shown):
        found: dict[str, Any] = {}
        exec(lines, found)
        assert found["model"].tokenize(b"hello")
        found["model"].close()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(name: str, tmp_path: Path, opened: Any) -> None:
    case = Case("llama", {"num_hidden_layers": 1}, 2, 64, False, "Q4_0")
    file, source, _, _ = written(tmp_path, case, TOKENIZERS[name], vocab_size=1000)
    model = opened(file, vocab_only=True)
    tokenizer = source.tokenizer()
    for text in made_tokenizers.SAMPLES:
        # `add_bos` asks for the rule of the file, and no other.
        have = model.tokenize(text.encode(), add_bos=True, special=True)
        assert have == tokenizer(text)["input_ids"], text
        assert model.detokenize(have, special=True).decode().strip() in tokenizer.decode(have)
    assert model.metadata["tokenizer.chat_template"] == made_tokenizers.TEMPLATE
    assert (model.token_bos(), model.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
