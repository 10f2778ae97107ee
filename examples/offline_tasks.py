"""Make a folder of task data without a network: real MMLU questions from lm-eval's own wheel.

    python examples/offline_tasks.py tasks/
    quantkit eval model-osc --tasks mmlu --tasks-dir tasks/

lm-eval carries the development questions of all 57 subjects inside its chain-of-thought prompts
(MIT licence). The 281 with four options are few: scores have wide error bars.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

PROMPTS = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"


def mmlu_questions() -> list[dict[str, Any]]:
    """The questions in the columns of the Hub's data set: question, subject, choices, answer."""
    import lm_eval

    prompts = (Path(lm_eval.__file__).parent / PROMPTS).read_text(encoding="utf-8")
    option = re.compile(r"\(([ABCD])\)\s*(.*?)\s*(?=\([ABCD]\)|$)", re.S)
    found = []
    for subject, text in json.loads(prompts).items():
        for block in re.split(r"\n\n(?=Q: )", text)[1:]:
            asked, _, reasoning = block[3:].rpartition("\nA: ")
            question, _, choices = asked.rpartition("\n(A)")
            answer = re.search(r"answer is \(([ABCD])\)", reasoning)
            options = [t for _, t in option.findall(f"(A){choices}")]
            if answer and question and len(options) == 4:
                row = {"question": question.strip(), "subject": subject, "choices": options}
                found.append({**row, "answer": "ABCD".index(answer[1])})
    return found


def main() -> None:
    """Write `FOLDER/mmlu/test.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder / "mmlu" / "test.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    questions = mmlu_questions()
    target.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    print(f"{len(questions)} questions in {target}")


if __name__ == "__main__":
    main()
