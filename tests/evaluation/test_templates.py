"""Of a conversation as tokens exactly those are answers that a model must learn to produce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.config.instructions import Template
from engine.data.conversations import Conversation, Turn, conversation_of
from engine.data.encoding import Encoder
from engine.errors import PreflightError
from engine.evaluation.answers import Written

# A model with a header for each turn, as Llama 3 has it: one token marks the end of a turn.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same, and says itself which part is the assistant's.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts are written in the last answer only, as Qwen 3 does it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}T:{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No header, and what ends a text ends an answer, as Llama 2 has it.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[I] {{ m.content }} [/I]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)
COUNTED = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
SHOUTED = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
SPECIAL = ["<pad>", "<s>", "</s>", "<|start|>", "<|stop|>", "<|eot|>", "<|im_start|>", "<|im_end|>"]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words, blanks and line ends are tokens; markers are special ones."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n| |[^\n ]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    from tokenizers import trainers

    text = [
        " ".join((HEADERS, ALPACA, ALPACA_WITH_INPUT)),
        *["Hi there Hello you And now ? Bye Be brief 1, 2 3 Add"] * 9,
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, normalized=False) for name in SPECIAL[3:]]}
    )
    return made


def pieces(
    tokenizer: Any, conversation: Conversation, template: Template = "model"
) -> list[tuple[str, bool]]:
    """A conversation as text, in pieces that are answers and pieces that are none."""
    (sample,) = Written(Encoder(tokenizer), template, "some").samples([conversation])
    found: list[tuple[str, bool]] = []
    begin = 0
    for end in range(1, len(sample.ids) + 1):
        if end == len(sample.ids) or sample.learned[end] != sample.learned[begin]:
            found.append((tokenizer.decode(sample.ids[begin:end]), bool(sample.learned[begin])))
            begin = end
    return found


def talk(*said: str, system: str = "") -> Conversation:
    roles = ("user", "assistant") * len(said)
    turns = tuple(Turn(role, text) for role, text in zip(roles, said, strict=False))  # type: ignore[arg-type]
    return (Turn("system", system), *turns) if system else turns


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def test_with_headers_the_text_and_the_end_of_the_turn_are_learned_token_by_token(tokenizer: Any) -> None:
    model = with_template(tokenizer, HEADERS)
    (sample,) = Written(Encoder(model), "model", "some").samples([talk("Hi", "Hello you", system="Be brief")])
    tokens = model.convert_ids_to_tokens(sample.ids.tolist())
    expected = [
        "<s>", "<|start|>", "system", "<|stop|>", "Ċ", "Be", "Ġ", "brief", "<|eot|>",
        "<|start|>", "user", "<|stop|>", "Ċ", "Hi", "<|eot|>",
        "<|start|>", "assistant", "<|stop|>", "Ċ", "Hello", "Ġ", "you", "<|eot|>",
    ]  # fmt: skip
    learned = [token for token, wanted in zip(tokens, sample.learned, strict=True) if wanted]
    assert "".join(tokens) == "".join(expected)
    assert "".join(learned) == "HelloĠyou<|eot|>"
    assert list(sample.learned).index(True) == len(sample.ids) - len(learned), "and nothing before"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_of_several_turns_every_answer_is_learned(tokenizer: Any, template: str) -> None:
    model = with_template(tokenizer, template)
    assert pieces(model, talk("Hi", "Hello", "And you ?", "Bye now")) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\nAnd you ?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Bye now<|im_end|>", True),
        ("\n", False),
    ]


def test_a_marked_template_gives_the_mask_that_transformers_gives(tokenizer: Any) -> None:
    model = with_template(tokenizer, MARKED)
    conversation = talk("Hi", "Hello there", "And ?", "Bye", system="Be brief")
    (sample,) = Written(Encoder(model, bos="never"), "model", "some").samples([conversation])
    own = model.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in conversation],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert own["input_ids"] == sample.ids.tolist()
    assert own["assistant_masks"] == sample.learned.astype(int).tolist()


def test_a_template_that_writes_the_last_turn_otherwise_is_understood(tokenizer: Any) -> None:
    model = with_template(tokenizer, THINKING)
    answers = [text for text, learned in pieces(model, talk("Hi", "Hello", "And ?", "Bye")) if learned]
    assert answers == ["Hello<|im_end|>", "T:Bye<|im_end|>"]


def test_what_ends_a_text_ends_an_answer_where_that_is_the_marker(tokenizer: Any) -> None:
    model = with_template(tokenizer, BRACKETS)
    assert pieces(model, talk("Hi", "Hello", "And ?", "Bye")) == [
        ("<s>[I] Hi [/I]", False),
        (" Hello </s>", True),
        ("<s>[I] And ? [/I]", False),
        (" Bye </s>", True),
    ]


def test_an_answer_that_is_not_to_be_learned_is_only_read(tokenizer: Any) -> None:
    turns = (Turn("user", "Hi"), Turn("assistant", "Bye", learned=False), *talk("Hi", "Hello"))
    for template in (CHATML, MARKED):
        found = pieces(with_template(tokenizer, template), turns)
        assert [text for text, learned in found if learned] == ["Hello<|im_end|>"]
    assert [text for text, learned in pieces(tokenizer, turns, "alpaca") if learned] == ["Hello</s>"]


def test_alpacas_published_prompt_is_written_to_the_letter(tokenizer: Any) -> None:
    assert pieces(tokenizer, talk("Hi", "Hello"), "alpaca") == [
        (f"{ALPACA}Hi\n\n### Response:", False),
        ("Hello</s>", True),
    ]
    row = {"instruction": "Add", "input": "1, 2", "output": "3"}
    assert pieces(tokenizer, conversation_of(row), "alpaca") == [
        (f"{ALPACA_WITH_INPUT}Add\n\n### Input:\n1, 2\n\n### Response:", False),
        ("3</s>", True),
    ]
    assert pieces(tokenizer, talk("Hi", "Hello", "And ?", "Bye", system="Be brief"), "alpaca") == [
        ("Be brief\n\n### Instruction:\nHi\n\n### Response:", False),
        ("Hello</s>", True),
        ("\n\n### Instruction:\nAnd ?\n\n### Response:", False),
        ("Bye</s>", True),
    ]


def test_chatml_is_what_a_model_with_that_template_writes(tokenizer: Any) -> None:
    conversation = talk("Hi", "Hello", "And ?", "Bye", system="Be brief")
    own = pieces(with_template(tokenizer, CHATML), conversation)
    assert pieces(tokenizer, conversation, "chatml") == own


def test_an_input_follows_its_instruction_where_a_template_knows_none(tokenizer: Any) -> None:
    row = {"instruction": "Add", "input": "1, 2", "output": "3"}
    (before, _), *_ = pieces(with_template(tokenizer, CHATML), conversation_of(row))
    assert before == "<|im_start|>user\nAdd\n\n1, 2<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "said", "says"),
    [
        (COUNTED, ("Hi", "Hello"), "another text"),
        (SHOUTED, ("Hi", "Hello"), "does not write an answer"),
        (BRACKETS, ("",), "no system turns here"),
        ("{% if messages | length > 1 %}{{ 1 // 0 }}{% endif %}", ("Hi", "Hello"), "division"),
    ],
)  # fmt: skip
def test_a_template_that_hides_the_answers_is_one_line(
    tokenizer: Any, template: str, said: Sequence[str], says: str
) -> None:
    model = with_template(tokenizer, template)
    conversation = talk(*said) if len(said) > 1 else talk("Hi", "Hello", system="Be brief")
    with pytest.raises(PreflightError, match=says) as caught:
        pieces(model, conversation)
    assert "chat template" in str(caught.value)
    assert "instructions.template=alpaca" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conversations_that_a_template_cannot_write_are_counted(tokenizer: Any) -> None:
    written = Written(Encoder(with_template(tokenizer, BRACKETS)), "model", "some")
    found = list(written.samples([talk("Hi", "Hello")] * 3 + [talk("Hi", "Bye", system="Be brief")]))
    assert len(found) == 3
    (line,) = written.words()
    assert "could not write 1 of 4 conversations" in line
    assert "no system turns here" in line


@pytest.mark.parametrize(
    ("template", "says"), [("model", "no chat template"), ("chatml", "no token <|im_start|>")]
)
def test_a_tokenizer_that_lacks_what_a_template_needs_is_refused(template: Template, says: str) -> None:
    from engine.models.tokenizer import byte_tokenizer

    bare = byte_tokenizer(300)
    bare.chat_template = None
    with pytest.raises(PreflightError) as caught:
        Written(Encoder(bare), template, "some")
    assert says in str(caught.value)


def test_what_every_sequence_begins_with_stands_there_once(tokenizer: Any) -> None:
    for template in (HEADERS, CHATML):
        encoder = Encoder(with_template(tokenizer, template), bos="always")
        (sample,) = Written(encoder, "model", "some").samples([talk("Hi", "Hello")])
        assert sample.ids.tolist().count(tokenizer.bos_token_id) == 1
        assert sample.ids[0] == tokenizer.bos_token_id
        assert not sample.learned[0]
