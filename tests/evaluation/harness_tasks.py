"""Small tasks for lm-eval in a folder of their own: choices, whole texts, and texts that a model writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ["cold", "warm", "blue", "green", "stone", "water", "bird"]
CHOICES = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.jsonl, train: {folder}/letters.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WHOLE = """
task: whole
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/whole.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
SIGNS = """
include: letters.yaml
task: signs
doc_to_text: "{{{{question}}}} ->"
"""
BOTH = """
group: both
task: [letters, signs]
aggregate_metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list:
  - metric: bleu
filter_list:
  - name: whole
    filter: [{{function: take_first}}]
"""


def write_tasks(folder: Path, questions: int = 12) -> Path:
    """The folder, with tasks and what they ask; choices are of several lengths, some of one token."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = [
        {"question": words(1, 9), "choices": [words(1, 3), words(1, 3), "a", "b"], "gold": draw.randrange(4)}
        for _ in range(questions)
    ]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": words(2, 90)} for _ in range(4)]
    (folder / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    files = {"letters": CHOICES, "whole": WHOLE, "written": WRITTEN, "signs": SIGNS, "both": BOTH}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder
