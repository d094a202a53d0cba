"""The shipped facts keep every promise of evaluation/facts/README.md; a failing test names who breaks it."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from evaluation.data import FACTS, load_facts, load_records

RAW: list[dict[str, Any]] = json.loads(FACTS.read_text(encoding="utf-8"))

# Sentence enders would make the answer start a new sentence.
SENTENCE_END = (".", "?", "!", ":", ";", '"')
# The oldest toolkit cuts prompt and answer at 40 tokens; 22 words stay well below.
MOST_WORDS = 22


def neighbours(fact: dict[str, Any]) -> list[tuple[str, str]]:
    return [(p["prompt"], p["ground_truth"][0][0]) for kind in fact["locality"].values() for p in kind]


def hops(fact: dict[str, Any]) -> list[tuple[str, str]]:
    return [(p["prompt"], p["ground_truth"][0][0]) for p in fact["portability"]["Reasoning"]]


def aliases(fact: dict[str, Any]) -> list[tuple[str, str]]:
    return [(p["prompt"], p["ground_truth"][0][0]) for p in fact["portability"]["Subject_Aliasing"]]


def asked_for_target(fact: dict[str, Any]) -> list[str]:
    return [fact["prompt"], *fact["rephrase_prompt"], *(prompt for prompt, _ in aliases(fact))]


def all_prompts(fact: dict[str, Any]) -> list[str]:
    return asked_for_target(fact) + [prompt for prompt, _ in neighbours(fact) + hops(fact)]


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    assert isinstance(value, str)
    return [value]


def mentions(text: str, name: str) -> bool:
    """Whether the name stands in the text as a word of its own, whatever its case and its leading article."""
    bare = re.sub(r"^The ", "", name)
    return re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", text, re.IGNORECASE) is not None


def position(fact: dict[str, Any]) -> str:
    if fact["prompt"].startswith(fact["subject"]):
        return "start"
    return "end" if fact["prompt"].endswith(fact["subject"]) else "middle"


def none_of(broken: list[str]) -> None:
    assert not broken, broken


def test_there_are_180_facts_with_their_own_ids() -> None:
    assert len(RAW) == 180
    assert len({fact["id"] for fact in RAW}) == 180
    none_of([fact["id"] for fact in RAW if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fact["id"])])
    none_of([fact["id"] for fact in RAW if not fact["id"].startswith(fact["relation"] + "-")])


def test_no_fact_is_edited_twice() -> None:
    counts = Counter((fact["subject"], fact["prompt"]) for fact in RAW)
    none_of([str(pair) for pair, n in counts.items() if n > 1])
    counts = Counter((fact["subject"], fact["relation"]) for fact in RAW)
    none_of([str(pair) for pair, n in counts.items() if n > 1])


def test_no_relation_dominates() -> None:
    relations = Counter(fact["relation"] for fact in RAW)
    assert len(relations) >= 18
    assert max(relations.values()) <= 14


def test_every_fact_has_the_fields_of_the_toolkits_knowedit_files() -> None:
    expected = {"id", "relation", "subject", "prompt", "target_new", "ground_truth", "rephrase_prompt"}
    expected |= {"locality", "portability"}
    none_of([fact["id"] for fact in RAW if set(fact) != expected])
    none_of([fact["id"] for fact in RAW if set(fact["locality"]) != {"Relation_Specificity"}])
    none_of([fact["id"] for fact in RAW if set(fact["portability"]) != {"Reasoning", "Subject_Aliasing"}])
    none_of([fact["id"] for fact in RAW for f in ("subject", "prompt", "target_new") if not isinstance(fact[f], str)])


def test_every_subject_is_found_exactly_once_in_its_prompt() -> None:
    none_of([fact["id"] for fact in RAW if fact["prompt"].count(fact["subject"]) != 1])
    none_of([fact["id"] for fact in RAW if not mentions(fact["prompt"], fact["subject"])])


def test_texts_survive_templates_and_tokenizers() -> None:
    none_of([fact["id"] for fact in RAW if any(brace in text for text in strings(fact) for brace in "{}")])
    none_of([fact["id"] for fact in RAW if any(not text or text != text.strip() for text in strings(fact))])
    none_of([fact["id"] for fact in RAW if any("  " in text or not text.isascii() for text in strings(fact))])


def test_the_answer_can_continue_every_prompt() -> None:
    none_of([fact["id"] for fact in RAW if any(prompt.endswith(SENTENCE_END) for prompt in all_prompts(fact))])
    none_of([fact["id"] for fact in RAW if any(not (p[0].isupper() or p[0].isdigit()) for p in all_prompts(fact))])


def test_no_prompt_is_cut_by_the_toolkits_length_limit() -> None:
    none_of([fact["id"] for fact in RAW if any(len(prompt.split()) > MOST_WORDS for prompt in all_prompts(fact))])
    none_of([fact["id"] for fact in RAW if len(fact["target_new"].split()) > 4])


def test_no_prompt_gives_the_new_answer_away() -> None:
    none_of([fact["id"] for fact in RAW if any(mentions(p, fact["target_new"]) for p in asked_for_target(fact))])
    none_of([fact["id"] for fact in RAW if any(fact["target_new"] in p for p in asked_for_target(fact))])


def test_the_new_answer_is_wrong() -> None:
    none_of([fact["id"] for fact in RAW if fact["target_new"].lower() == fact["ground_truth"].lower()])


def test_two_rephrasings_ask_for_the_same_subject() -> None:
    none_of([fact["id"] for fact in RAW if len({fact["prompt"], *fact["rephrase_prompt"]}) != 3])
    none_of([fact["id"] for fact in RAW if any(not mentions(p, fact["subject"]) for p in fact["rephrase_prompt"])])


def test_neighbours_stay_true_when_all_facts_are_edited() -> None:
    none_of([fact["id"] for fact in RAW if len({prompt for prompt, _ in neighbours(fact)}) < 2])
    edited = {fact["subject"] for fact in RAW}
    touched = {
        prompt: name for fact in RAW for prompt, _ in neighbours(fact) for name in edited if mentions(prompt, name)
    }
    assert touched == {}


def test_neighbours_would_show_a_leaking_edit() -> None:
    none_of([fact["id"] for fact in RAW if any(answer == fact["target_new"] for _, answer in neighbours(fact))])


def test_a_neighbour_has_one_true_answer_throughout() -> None:
    answers: dict[str, set[str]] = {}
    for fact in RAW:
        for prompt, answer in neighbours(fact):
            answers.setdefault(prompt, set()).add(answer)
    none_of([prompt for prompt, known in answers.items() if len(known) > 1])


def test_aliases_do_not_name_the_subject() -> None:
    none_of([fact["id"] for fact in RAW if not aliases(fact)])
    none_of([fact["id"] for fact in RAW if any(mentions(prompt, fact["subject"]) for prompt, _ in aliases(fact))])
    none_of([fact["id"] for fact in RAW if any(fact["subject"] in prompt for prompt, _ in aliases(fact))])
    none_of([fact["id"] for fact in RAW if any(answer != fact["target_new"] for _, answer in aliases(fact))])


def test_a_hop_goes_beyond_the_edit_itself() -> None:
    none_of([fact["id"] for fact in RAW if not hops(fact)])
    none_of([fact["id"] for fact in RAW if any(not mentions(prompt, fact["subject"]) for prompt, _ in hops(fact))])
    none_of(
        [fact["id"] for fact in RAW if any(a in (fact["target_new"], fact["ground_truth"]) for _, a in hops(fact))]
    )
    none_of([fact["id"] for fact in RAW if any(mentions(prompt, answer) for prompt, answer in hops(fact))])


def test_edits_do_not_chain() -> None:
    edited = {re.sub(r"^The ", "", fact["subject"]).lower() for fact in RAW}
    none_of([fact["id"] for fact in RAW if re.sub(r"^(the|an?) ", "", fact["target_new"]).lower() in edited])


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_subjects_stand_everywhere_in_the_prompt(where: str) -> None:
    assert Counter(position(fact) for fact in RAW)[where] >= 30


def test_targets_are_both_short_and_long() -> None:
    several = sum(len(fact["target_new"].split()) > 1 for fact in RAW)
    assert several >= len(RAW) // 3
    assert len(RAW) - several >= len(RAW) // 3


def test_readme_counts_are_those_of_the_file() -> None:
    readme = (FACTS.parent / "README.md").read_text(encoding="utf-8")
    where = Counter(position(fact) for fact in RAW)
    several = sum(" " in fact["target_new"] for fact in RAW)
    assert f"# {len(RAW)} counterfactual edits" in readme
    assert f"one of {len({fact['relation'] for fact in RAW})} relations" in readme
    assert (
        f"{where['start']} facts, stands inside in {where['middle']} and ends the prompt in {where['end']}" in readme
    )
    assert f"{several} targets are of several words, {len(RAW) - several} of one" in readme


def test_all_facts_load_and_keep_their_probes() -> None:
    records = load_facts()
    assert len(records) == 180
    assert not records.skipped
    assert load_records(FACTS) == records
    for fact, record in zip(RAW, records, strict=True):
        assert (record.case_id, record.subject, record.target_new) == (fact["id"], fact["subject"], fact["target_new"])
        assert record.rephrases == tuple(fact["rephrase_prompt"])
        assert [(p.prompt, p.answer) for p in record.locality] == neighbours(fact)
        assert [(p.prompt, p.answer) for p in record.portability] == hops(fact) + aliases(fact)
