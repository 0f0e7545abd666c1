"""Commands that work with a finished run: measure and export it again, let it write, time its exports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from engine.config.formats import DEFAULT_FORMAT, FORMATS, refuse_unheld
from engine.errors import UsageError
from engine.run.task import BENCH_NEW_TOKENS, BENCH_PROMPT_TOKENS, NEW_TOKENS, check_prompt
from eqat_tui.commands.options import Detach, Device, Json, RemoteCode, Run, RunsDir, Settings, folder_of


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run; or a checkpoint: an export, a model's folder or hub id, a .gguf file.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT,...",
            help="wikitext2, c4, builtin, a hub id or a path; several with commas, or again. Else the run's "
            "own, or wikitext2.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", help="Tokens of context. Else the run's own, or up to 2048."),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows", help="At most so many of each text; 0 for all. Else the run's own bound, or all."
        ),
    ] = None,
    bos: Annotated[
        str | None,
        typer.Option(
            "--bos",
            metavar="PROTOCOL",
            help="Where begin-of-text tokens stand: auto and always, in each window; text, once before each "
            "text; never.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Ask tasks: winogrande, piqa, hellaswag, arc_easy, arc_challenge, .jsonl files, any of "
            "lm-eval's like gsm8k or mmlu:5. Alone, no perplexity is measured.",
        ),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option("--task-limit", help="At most so many questions of each task.")
    ] = None,
    task_folder: Annotated[
        str | None,
        typer.Option("--task-folder", metavar="FOLDER", help="Of task files for lm-eval; their code is run."),
    ] = None,
    task_chat: Annotated[
        bool, typer.Option("--task-chat", help="Put lm-eval's questions in the model's chat template.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="MODEL", help="Measure a checkpoint's divergence from this model."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write what was measured of a checkpoint here as JSON."),
    ] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    runs_dir: RunsDir = None,
    detach: Detach = False,
    as_json: Json = False,
) -> int:
    """Measure perplexity or ask tasks: of a run's quantized model again or otherwise, or of any checkpoint.

    What is measured of a run on another --data, at another --sequence-length or --bos is kept beside it, for
    show and compare. Of a run, and of a checkpoint with --reference, the divergence from full precision is
    measured as well: KL, agreement, logit error, and the error behind each block.
    """
    from eqat_tui import actions, evaluating

    asked = evaluating.Tasks(tasks or (), task_limit, task_folder, task_chat)
    how = evaluating.how_of(data, sequence_length, windows, bos, asked)
    if (checkpoint := evaluating.checkpoint_of(target)) is not None:
        if detach:
            raise UsageError("is for runs", where="--detach", hint="a checkpoint has no log to follow")
        request = evaluating.request_of(checkpoint, reference, how, device, trust_remote_code)
        return evaluating.measure(request, out, as_json=as_json)
    for name, given in (
        ("--reference", reference is not None),
        ("--out", out is not None),
        ("--trust-remote-code", trust_remote_code),
    ):
        if given:
            raise UsageError("is for checkpoints; a run knows it itself", where=name, hint="leave it out")
    found = actions.find_trained(actions.run_of(target), runs_dir)
    args = ["--task", "eval", *evaluating.arguments_of(found, how)]
    if device is not None:
        args += actions.operational(found, {"runtime.device": device})
    told = evaluating.told_of_run if how.is_asked else None
    return actions.start(found, args=args, detach=detach, as_json=as_json, told=told)


def export(
    run: Run,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME,...",
            help=f"{', '.join(FORMATS.names())}; several with commas, or again. Else the run's own.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            parser=folder_of("--to"),
            metavar="FOLDER",
            help="Copy the verified checkpoint here as well.",
        ),
    ] = None,
    settings: Settings = None,
    runs_dir: RunsDir = None,
    detach: Detach = False,
    as_json: Json = False,
) -> int:
    """Write a run's packed checkpoint again, in one format or several, and verify it.

    --set changes export.*, this time only: export.dtype=bfloat16.
    """
    from engine.system.copying import check_target
    from eqat_tui import actions
    from eqat_tui.configure import parse_settings

    names = _formats(format)
    found = actions.find_trained(run, runs_dir)
    refuse_unheld("--format", names, found.config().grid)
    args = ["--task", "export", *actions.operational(found, parse_settings(settings or ()))]
    for name in names or found.config().export.formats or (DEFAULT_FORMAT,):
        args += ["--format", name]
    if to is not None:
        to = Path(os.path.expanduser(to)).absolute()
        check_target(to, found.path)
        args += ["--to", str(to)]
    return actions.start(found, args=args, detach=detach, as_json=as_json)


def _formats(typed: list[str] | None) -> list[str]:
    """The formats that were asked for, each once, in order; nothing where none was.

    Raises:
        UsageError: for one that is not in the table.
    """
    names = [name.strip() for text in typed or [] for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UsageError(
                f"there is no format {name!r}", where="--format", hint=", ".join(FORMATS.names())
            )
    return list(dict.fromkeys(names))


def generate(
    run: Run,
    prompt: Annotated[str, typer.Option("--prompt", help="What the models are to continue.")],
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="At most so many.")] = NEW_TOKENS,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Let the full-precision and the quantized model continue a prompt, side by side."""
    from eqat_tui import actions
    from eqat_tui.run_text import samples

    check_prompt(prompt, new_tokens)
    args = ("--task", "generate", f"--prompt={prompt}", "--new-tokens", str(new_tokens))
    found = actions.find_trained(run, runs_dir)
    return actions.start(found, args=args, detach=False, as_json=as_json, told=samples)


def bench(
    run: Run,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="NAME,...", help="Only these exports; several with commas, or again."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="So many are read at once.")
    ] = BENCH_PROMPT_TOKENS,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="So many are written after them.")
    ] = BENCH_NEW_TOKENS,
    device: Device = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Measure tokens per second and memory of a run's exports, in each loader that is installed here.

    Beside 16 bits: transformers with the weights of an export unpacked. Then gptqmodel, auto-round, mlx-lm,
    llama.cpp and ONNX Runtime, each with the exports that it reads, in a process of its own.
    """
    from eqat_tui import actions, benching
    from eqat_tui.bench_text import bench_text
    from eqat_tui.output import print_json, say
    from eqat_tui.output import show as show_text

    names = _formats(format)
    benching.check_tokens(prompt_tokens, new_tokens)
    its = actions.find(run, runs_dir)
    found = benching.bench(
        its,
        benching.exported_formats(its, names),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=benching.checked_device(its, device),
        heard=say,
    )
    if as_json:
        print_json(found)
    else:
        show_text(bench_text(found))
    return benching.outcome(found)


def push(
    run: Run,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A repository of yours: name/model-w2g64.")],
    format: Annotated[
        str | None, typer.Option("--format", help="Which export, where the run has several.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ID",
            help="The hub id of what was quantized, for the card, where it was a folder.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, made where it is missing.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is for you alone.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """Send a verified export to the Hugging Face hub, with its model card. What will be sent is shown first.

    Nothing else of the run is sent. HF_ENDPOINT names another hub than huggingface.co.
    """
    from eqat_tui import actions, pushing

    found = actions.find(actions.run_of(run), runs_dir)
    return pushing.push(
        found,
        repo,
        format=format,
        base=base_model,
        revision=revision,
        private=private,
        yes=yes,
    )
