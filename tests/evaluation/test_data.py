"""Every published file shape becomes the same records, and nothing is lost or bent on the way without saying so."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coachhook_plugin.tokens import parse_requests
from evaluation.data import (
    BRACES,
    EMPTY_TARGET,
    HALF_CHARACTER,
    NO_SUBJECT,
    SUBJECT_ABSENT,
    SUBJECT_REPEATED,
    Probe,
    Record,
    Records,
    answerable,
    load_facts,
    load_records,
)

load_zsre, load_counterfact, load_knowedit, load_mquake, load_hallucination = (
    partial(load_records, shape=shape) for shape in ("zsre", "counterfact", "knowedit", "mquake", "hallucination")
)

ZSRE: dict[str, Any] = {
    "subject": "Lake Quill",
    "src": "Which river feeds Lake Quill?",
    "pred": "Anser",
    "rephrase": "What river runs into Lake Quill?",
    "alt": "Great Ostrel",
    "answers": ["Anser", "the Anser"],
    "loc": "nq question: who sang the song of the quay",
    "loc_ans": "Mara Veld",
    "cond": "Anser >> Great Ostrel || Which river feeds Lake Quill?",
}
FLAT: dict[str, Any] = {
    "case_id": 17,
    "prompt": "The mother tongue of Ada Brun is",
    "target_new": "Finnish",
    "subject": "Ada Brun",
    "ground_truth": "French",
    "rephrase_prompt": "At home, Ada Brun speaks",
    "locality_prompt": "The mother tongue of Jean Roux is",
    "locality_ground_truth": "French",
}
ROME: dict[str, Any] = {
    "case_id": 5,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "Finnish", "id": "Q1412"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Ada Brun",
    },
    "paraphrase_prompts": ["At home, Ada Brun speaks", "As a child, Ada Brun learned"],
    "neighborhood_prompts": ["The mother tongue of Jean Roux is", "Luc Petit is a native speaker of"],
    "attribute_prompts": ["The mother tongue of Aino Salo is"],
    "generation_prompts": ["Ada Brun lives in"],
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Port Ellis",
    "prompt": "The mayor of Port Ellis is",
    "target_new": "Ida Holt",
    "ground_truth": ["Tom Reed"],
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The mayor of Fern Bay is", "ground_truth": [["Ann Cole", "A. Cole"]]},
            {"prompt": "The mayor of Old Mill is", "ground_truth": [[""]]},
        ],
        "Forgetfulness": [{"prompt": ["Port Ellis lies by the"], "ground_truth": ["sea"]}],
    },
    "portability": {
        "Reasoning": [{"prompt": "The home town of the mayor of Port Ellis is", "ground_truth": [["Hull"]]}],
        "Subject_Aliasing": [],
        "Logical_Generalization": [{"prompt": "Ida Holt works in", "ground_truth": "Port Ellis"}],
    },
}


def write(folder: Path, content: object) -> Path:
    path = folder / "set.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


# ------------------------------------------------------------------------------------------ each shape is read in full


def test_zsre_record_keeps_question_answer_rephrasing_and_neighbour(tmp_path: Path) -> None:
    assert load_zsre(write(tmp_path, [ZSRE])) == [
        Record(
            case_id="0",
            prompt="Which river feeds Lake Quill?",
            subject="Lake Quill",
            target_new="Great Ostrel",
            ground_truth="Anser",
            rephrases=("What river runs into Lake Quill?",),
            locality=(Probe("neighborhood", "nq question: who sang the song of the quay", "Mara Veld"),),
        )
    ]


def test_flat_counterfact_record_keeps_its_own_case_id(tmp_path: Path) -> None:
    assert load_counterfact(write(tmp_path, [FLAT])) == [
        Record(
            case_id="17",
            prompt="The mother tongue of Ada Brun is",
            subject="Ada Brun",
            target_new="Finnish",
            ground_truth="French",
            rephrases=("At home, Ada Brun speaks",),
            locality=(Probe("neighborhood", "The mother tongue of Jean Roux is", "French"),),
        )
    ]


def test_original_counterfact_record_keeps_all_paraphrases_and_neighbours(tmp_path: Path) -> None:
    (record,) = load_counterfact(write(tmp_path, [ROME]))
    assert (record.prompt, record.subject) == ("The mother tongue of Ada Brun is", "Ada Brun")
    assert (record.target_new, record.ground_truth) == ("Finnish", "French")
    assert record.rephrases == ("At home, Ada Brun speaks", "As a child, Ada Brun learned")
    assert record.locality == (
        Probe("neighborhood", "The mother tongue of Jean Roux is", "French"),
        Probe("neighborhood", "Luc Petit is a native speaker of", "French"),
    )


def test_both_counterfact_formats_may_stand_in_one_file(tmp_path: Path) -> None:
    flat, original = load_counterfact(write(tmp_path, [FLAT, ROME]))
    assert flat.prompt == original.prompt
    assert flat.target_new == original.target_new


def test_knowedit_record_keeps_its_kinds_and_takes_the_first_of_nested_answers(tmp_path: Path) -> None:
    (record,) = load_knowedit(write(tmp_path, [KNOWEDIT]))
    assert (record.ground_truth, record.rephrases) == ("Tom Reed", ())
    assert record.locality == (
        Probe("Relation_Specificity", "The mayor of Fern Bay is", "Ann Cole"),
        Probe("Forgetfulness", "Port Ellis lies by the", "sea"),
    )
    assert record.portability == (
        Probe("Reasoning", "The home town of the mayor of Port Ellis is", "Hull"),
        Probe("Logical_Generalization", "Ida Holt works in", "Port Ellis"),
    )


def test_knowedit_wikibio_names_for_the_same_fields_are_understood(tmp_path: Path) -> None:
    raw = {"concept": "ada brun", "text": "About ada brun: she", "labels": "sailed round Cape Horn.", "locality": {}}
    (record,) = load_records(write(tmp_path, [raw]))
    assert (record.subject, record.target_new, record.ground_truth) == ("ada brun", "sailed round Cape Horn.", "")


def test_knowedit_files_without_an_old_answer_can_still_be_edited(tmp_path: Path) -> None:
    (record,) = load_knowedit(write(tmp_path, [without(KNOWEDIT, "ground_truth")]))
    assert record.ground_truth == ""
    assert record.request()["ground_truth"] == ""


@pytest.mark.parametrize("raw", [ZSRE, FLAT, ROME])
def test_portability_question_of_the_toolkits_own_files_is_not_lost(tmp_path: Path, raw: dict[str, Any]) -> None:
    hop = {"Recalled Relation": "(a, b, c)", "New Question": "Where does it end?", "New Answer": "at sea"}
    (record,) = load_records(write(tmp_path, [{**raw, "portability": hop}]))
    assert record.portability == (Probe("one_hop", "Where does it end?", "at sea"),)


def test_outer_spaces_do_not_become_part_of_a_target(tmp_path: Path) -> None:
    (record,) = load_counterfact(write(tmp_path, [{**FLAT, "target_new": " Finnish\n", "rephrase_prompt": ""}]))
    assert record.target_new == "Finnish"
    assert record.rephrases == ()


def test_letters_beyond_ascii_arrive_unbroken(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{**FLAT, "target_new": "Español"}], ensure_ascii=False), encoding="utf-8")
    assert load_records(path)[0].target_new == "Español"


# --------------------------------------------------------------------------------------------- the shape is recognised


@pytest.mark.parametrize(
    ("raw", "load"), [(ZSRE, load_zsre), (FLAT, load_counterfact), (ROME, load_counterfact), (KNOWEDIT, load_knowedit)]
)
def test_a_file_is_recognised_without_naming_its_kind(tmp_path: Path, raw: dict[str, Any], load: Any) -> None:
    path = write(tmp_path, [raw])
    assert load_records(path) == load(path)
    assert load_records(str(path), limit=1) == load(path)


def test_a_plain_list_of_edits_is_enough(tmp_path: Path) -> None:
    raw = {"prompt": "The mayor of Port Ellis is", "subject": "Port Ellis", "target_new": "Ida Holt"}
    (record,) = load_records(write(tmp_path, [raw]))
    assert record == Record("0", raw["prompt"], raw["subject"], raw["target_new"])


def test_an_unknown_file_is_refused_with_the_shapes_that_are_known(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "?", "answer": "!"}])
    with pytest.raises(ValueError, match=r"set\.json, record 0: .*'answer', 'question'.*ZsRE.*CounterFact.*KnowEdit"):
        load_records(path)


# ----------------------------------------------------------------------- what cannot be edited is left out and counted


def test_records_that_would_break_an_edit_are_left_out_and_counted(tmp_path: Path) -> None:
    raw = [
        {**ZSRE, "alt": ""},
        {**ZSRE, "src": "Which river feeds lake quill?"},
        ZSRE,
        {**ZSRE, "src": "Lake Quill: which river feeds Lake Quill?"},
        {**ZSRE, "src": "Where do bananas grow?", "subject": "ana"},
        {**ZSRE, "subject": ""},
        {**ZSRE, "alt": "  "},
        {**ZSRE, "src": "Which {big} river feeds Lake Quill?"},
        {**ZSRE, "alt": "\ud83d"},
    ]
    records = load_zsre(write(tmp_path, raw))
    assert [record.case_id for record in records] == ["2"]
    expected = {EMPTY_TARGET: 2, SUBJECT_ABSENT: 1, SUBJECT_REPEATED: 2, NO_SUBJECT: 1, BRACES: 1, HALF_CHARACTER: 1}
    assert records.skipped == expected


def test_what_our_loaders_give_is_what_a_session_takes(tmp_path: Path) -> None:
    """A record that is refused at its batch, hours into a run, ends that run."""
    odd = ("{", "}", "\ud83d", "\udc4d", "é", "\u2028", "\0", "Lake Quill", " ")
    raw = [ZSRE, *({**ZSRE, "src": f"{text} which river feeds Lake Quill?"} for text in odd)]
    raw += [{**ZSRE, "alt": f"the Moy{text}"} for text in odd]
    for record in load_zsre(write(tmp_path, raw)):
        parse_requests([record.request()])


@pytest.mark.parametrize("nothing", ["null", "NaN"])
def test_a_probe_without_an_answer_is_no_probe_and_its_record_stays(tmp_path: Path, nothing: str) -> None:
    """pandas writes NaN for what a table lacks."""
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{**WIKIBIGEDIT, "mhop_ans": "?"}]).replace('"?"', nothing), encoding="utf-8")
    (record,) = load_records(path)
    assert [probe.kind for probe in record.portability] == ["personas"]
    path.write_text(json.dumps([{**WIKIBIGEDIT, "mhop": "?"}]).replace('"?"', nothing), encoding="utf-8")
    (record,) = load_records(path)
    assert [probe.kind for probe in record.portability] == ["personas"]


@pytest.mark.parametrize("nothing", [None, math.nan, [None]])
def test_one_row_without_a_value_does_not_cost_the_whole_file(tmp_path: Path, nothing: object) -> None:
    raw = [WIKIBIGEDIT, *({**WIKIBIGEDIT, name: nothing} for name in ("ans", "subject", "update")), WIKIBIGEDIT]
    records = load_records(write(tmp_path, raw))
    assert [record.case_id for record in records] == ["0", "4"]
    assert records.skipped == {EMPTY_TARGET: 1, NO_SUBJECT: 1, SUBJECT_ABSENT: 1}
    probes = {"Relation_Specificity": [{"prompt": "The mayor of Fern Bay is", "ground_truth": nothing}]}
    (record,) = load_knowedit(write(tmp_path, [{**KNOWEDIT, "locality": probes}]))
    assert record.locality == ()


@pytest.mark.parametrize("year", [1984, 1984.0, ["1984"]])
def test_an_answer_that_is_a_number_is_its_digits(tmp_path: Path, year: object) -> None:
    (record,) = load_records(write(tmp_path, [{**WIKIBIGEDIT, "ans": year, "loc_ans": year}]))
    assert (record.target_new, record.locality[0].answer) == ("1984", "1984")


@pytest.mark.parametrize(("raw", "name"), [(FLAT, "prompt"), (KNOWEDIT, "prompt")])
def test_every_loader_leaves_out_prompts_without_their_subject(tmp_path: Path, raw: dict[str, Any], name: str) -> None:
    records = load_records(write(tmp_path, [raw, {**raw, name: "Somebody else is"}]))
    assert len(records) == 1
    assert records.skipped == {SUBJECT_ABSENT: 1}


def test_a_limit_counts_usable_records(tmp_path: Path) -> None:
    path = write(tmp_path, [{**ZSRE, "alt": ""}, ZSRE, ZSRE, ZSRE, {**ZSRE, "alt": ""}])
    records = load_zsre(path, limit=2)
    assert [record.case_id for record in records] == ["1", "2"]
    assert records.skipped == {EMPTY_TARGET: 1}
    assert len(load_zsre(path, limit=99)) == 3
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_zsre(path, limit=0)


def test_a_file_with_nothing_to_edit_is_not_taken_for_a_finished_run(tmp_path: Path) -> None:
    path = write(tmp_path, [{**ZSRE, "alt": ""}] * 3)
    with pytest.raises(ValueError, match=r"set\.json: none of its 3 records can be edited \(empty target: 3\)"):
        load_zsre(path)


# ------------------------------------------------------------------------------- errors say where, what and what to do


@pytest.mark.parametrize(
    ("raw", "load", "field"),
    [
        (ZSRE, load_zsre, "alt"),
        (ZSRE, load_zsre, "src"),
        (ZSRE, load_zsre, "subject"),
        (ZSRE, load_zsre, "loc_ans"),
        (FLAT, load_counterfact, "target_new"),
        (FLAT, load_counterfact, "prompt"),
        (KNOWEDIT, load_knowedit, "subject"),
    ],
)
def test_a_missing_field_is_named_with_its_record_and_file(
    tmp_path: Path, raw: dict[str, Any], load: Any, field: str
) -> None:
    path = write(tmp_path, [raw, without(raw, field)])
    with pytest.raises(ValueError, match=rf"set\.json, record 1: field '{field}' is missing.*add it"):
        load(path)


def test_a_field_inside_a_field_is_named_by_its_full_path(tmp_path: Path) -> None:
    rewrite = without(ROME["requested_rewrite"], "target_true")
    with pytest.raises(ValueError, match=r"record 0: field 'requested_rewrite\.target_true' is missing"):
        load_counterfact(write(tmp_path, [{**ROME, "requested_rewrite": rewrite}]))
    probe = {"Relation_Specificity": [{"prompt": "The mayor of Fern Bay is"}]}
    with pytest.raises(ValueError, match=r"field 'locality\.Relation_Specificity\[0\]\.ground_truth' is missing"):
        load_knowedit(write(tmp_path, [{**KNOWEDIT, "locality": probe}]))


def test_a_template_without_a_place_for_the_subject_is_refused(tmp_path: Path) -> None:
    rewrite = {**ROME["requested_rewrite"], "prompt": "The mother tongue of Ada Brun is"}
    with pytest.raises(ValueError, match=r"field 'requested_rewrite\.prompt' must hold the subject's place"):
        load_counterfact(write(tmp_path, [{**ROME, "requested_rewrite": rewrite}]))


def test_prompts_and_answers_that_do_not_pair_up_are_refused(tmp_path: Path) -> None:
    probes = {"Forgetfulness": [{"prompt": ["a", "b"], "ground_truth": ["x"]}]}
    with pytest.raises(ValueError, match=r"locality\.Forgetfulness\[0\]\.ground_truth' must be a list of 2 answers"):
        load_knowedit(write(tmp_path, [{**KNOWEDIT, "locality": probes}]))


@pytest.mark.parametrize(("value", "found"), [(True, "bool"), ({"str": "x"}, "dict"), ([[False]], "bool")])
def test_a_field_that_is_no_text_is_refused(tmp_path: Path, value: object, found: str) -> None:
    with pytest.raises(ValueError, match=rf"record 0: field 'alt' must be text, not {found}"):
        load_zsre(write(tmp_path, [{**ZSRE, "alt": value}]))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{ not json", "not a JSON file"),
        ("[]", "holds an empty list"),
        ('{"a": 1}', "holds one dict"),
        ("[1]", "record 0: must be an object of named fields, not int"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"set\.json.*{problem}"):
        load_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_records(tmp_path / "absent.json")


# ---------------------------------------------------------------------------------------- the toolkit takes the result


def test_request_has_the_shape_that_the_toolkits_evaluation_reads() -> None:
    record = Record(
        case_id="a",
        prompt="The mayor of Port Ellis is",
        subject="Port Ellis",
        target_new="Ida Holt",
        ground_truth="Tom Reed",
        rephrases=("Port Ellis is led by", "In Port Ellis, the mayor is"),
        locality=(Probe("near", "p1", "a1"), Probe("far", "p2", "a2"), Probe("near", "p3", "a3")),
        portability=(Probe("hop", "p4", "a4"),),
    )
    assert record.request() == {
        "case_id": "a",
        "prompt": "The mayor of Port Ellis is",
        "subject": "Port Ellis",
        "target_new": "Ida Holt",
        "ground_truth": "Tom Reed",
        "rephrase_prompt": "Port Ellis is led by",
        "locality": {
            "near": {"prompt": ["p1", "p3"], "ground_truth": ["a1", "a3"]},
            "far": {"prompt": ["p2"], "ground_truth": ["a2"]},
        },
        "portability": {"hop": {"prompt": ["p4"], "ground_truth": ["a4"]}},
    }


def test_request_without_rephrasing_or_probes_asks_the_toolkit_for_none() -> None:
    request = Record("a", "The mayor of Port Ellis is", "Port Ellis", "Ida Holt").request()
    assert "rephrase_prompt" not in request
    assert request["locality"] == {}
    assert request["portability"] == {}


def test_a_request_can_be_changed_without_touching_the_record() -> None:
    record = load_facts(limit=1)[0]
    request = record.request()
    request["locality"].clear()
    request["portability"]["Reasoning"]["prompt"].append("more")
    assert record.request() != request
    assert record == load_facts(limit=1)[0]


def test_records_cannot_change_under_a_running_experiment() -> None:
    record = load_facts(limit=1)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.target_new = "else"  # type: ignore[misc]
    assert len({record, load_facts(limit=1)[0]}) == 1


def test_shipped_facts_load_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = load_facts(limit=3)
    assert isinstance(records, Records)
    assert len(records) == 3
    assert not records.skipped


# ------------------------------------------------------------------------------------- shapes with questions in steps

WIKIBIGEDIT: dict[str, Any] = {
    "subject": "Port Ellis",
    "update": "Who is the mayor of Port Ellis?",
    "ans": "Ida Holt",
    "rephrase": "Which person governs Port Ellis?",
    "personas": "Arr, who be the mayor of Port Ellis?",
    "mhop": "Where was the mayor of Port Ellis born?",
    "mhop_ans": "Hull",
    "loc": "Who is the mayor of Fern Bay?",
    "loc_ans": "Ann Cole",
}
MQUAKE: dict[str, Any] = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is led by",
            "question": "Who leads Port Ellis?",
            "target_new": {"str": "Ida Holt", "id": "Q1"},
            "target_true": {"str": "Tom Reed", "id": "Q2"},
            "subject": "Port Ellis",
        },
        {
            "prompt": "{} was born in",
            "question": "Where was Ida Holt born?",
            "target_new": {"str": "Hull", "id": "Q3"},
            "target_true": {"str": "York", "id": "Q4"},
            "subject": "Ida Holt",
        },
    ],
    "questions": ["Where was the leader of Port Ellis born?", "What is the birthplace of Port Ellis's leader?"],
    "answer": "Leeds",
    "new_answer": "Hull",
}
HALLUCINATION: dict[str, Any] = {
    "prompt": "This is a Wikipedia passage about john russell brun. John Russell Brun (1820 to 1890) was",
    "target_new": " an English painter",
    "subject": "john_russell_brun",
    "locality_prompt": "The sea was calm",
    "locality_ground_truth": " that night",
}


def test_wikibigedit_record_keeps_the_questions_of_other_people_and_in_steps(tmp_path: Path) -> None:
    (found,) = load_records(write(tmp_path, [WIKIBIGEDIT]))
    assert (found.prompt, found.subject, found.target_new) == (WIKIBIGEDIT["update"], "Port Ellis", "Ida Holt")
    assert found.rephrases == (WIKIBIGEDIT["rephrase"],)
    assert found.locality == (Probe("neighborhood", "Who is the mayor of Fern Bay?", "Ann Cole"),)
    assert found.portability == (
        Probe("personas", WIKIBIGEDIT["personas"], "Ida Holt"),
        Probe("multi_hop", WIKIBIGEDIT["mhop"], "Hull"),
    )


def test_mquake_asks_in_steps_only_when_every_step_is_written(tmp_path: Path) -> None:
    one, other = load_records(write(tmp_path, [MQUAKE]))
    assert (one.case_id, one.prompt, one.target_new) == ("3.0", "Port Ellis is led by", "Ida Holt")
    assert (other.case_id, other.prompt, other.ground_truth) == ("3.1", "Ida Holt was born in", "York")
    assert one.portability == ()
    assert other.portability == tuple(Probe("multi_hop", question, "Hull") for question in MQUAKE["questions"])
    assert len(load_records(write(tmp_path, [MQUAKE]), limit=1)) == 1


@pytest.mark.parametrize("broken", [0, 1])
def test_mquake_asks_nothing_in_steps_of_a_case_that_lacks_one(tmp_path: Path, broken: int) -> None:
    """Whichever step cannot be written, the answer cannot follow."""
    rewrites = [
        {**rewrite, "subject": ""} if i == broken else rewrite for i, rewrite in enumerate(MQUAKE["requested_rewrite"])
    ]
    found = load_records(write(tmp_path, [{**MQUAKE, "requested_rewrite": rewrites}, {**MQUAKE, "case_id": 4}]))
    assert found.skipped == {NO_SUBJECT: 1}
    assert [record.case_id for record in found] == [f"3.{1 - broken}", "4.0", "4.1"]
    assert [len(record.portability) for record in found] == [0, 0, 2]


def test_questions_in_steps_go_where_all_steps_go(tmp_path: Path) -> None:
    one, other = load_records(write(tmp_path, [MQUAKE]))
    plain = Record("a", "Rome is in", "Rome", "Spain", portability=(Probe("hop", "Who rules Rome?", "A king"),))
    assert answerable([one, other, plain]) == [one, other, plain]
    assert answerable([other, plain]) == [dataclasses.replace(other, portability=()), plain]


def test_hallucination_records_are_not_taken_for_counterfact(tmp_path: Path) -> None:
    """Read as CounterFact, none of their subjects would be found."""
    one_word = {**HALLUCINATION, "prompt": "A passage about brun. Brun was", "subject": "brun"}
    path = write(tmp_path, [one_word, HALLUCINATION])
    found = load_records(path)
    assert found == load_hallucination(path)
    assert [record.subject for record in found] == ["brun", "john russell brun"]
    absent = {**FLAT, "prompt": "Somebody else is", "subject": "ada_brun"}
    assert load_records(write(tmp_path, [absent, FLAT])).skipped == {SUBJECT_ABSENT: 1}


def test_hallucination_subjects_are_found_in_their_passage(tmp_path: Path) -> None:
    once = {**HALLUCINATION, "prompt": "A passage about John Russell Brun, a painter, says that he was"}
    (found,) = load_hallucination(write(tmp_path, [once]))
    assert (found.subject, found.target_new) == ("John Russell Brun", "an English painter")
    with pytest.raises(ValueError, match="subject not in the prompt: 1"):
        load_hallucination(write(tmp_path, [{**once, "subject": "ada_brun"}]))


def test_mquake_without_a_list_of_edits_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"requested_rewrite.*must be a list of objects, not str"):
        load_mquake(write(tmp_path, [{**MQUAKE, "requested_rewrite": "x"}]))
