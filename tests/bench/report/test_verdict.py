"""Verdicts and warnings: made-up groups whose right answer is plain, and the document's table."""

from __future__ import annotations

import statistics

import pytest

from filterfold.bench.report import read_table, verdict
from filterfold.bench.report.study import TOP1, TRAIN_IMAGES, TRAIN_MACS, call_seconds, studies
from filterfold.bench.report.verdict import headline, judge, power_words, sentence
from filterfold.bench.report.warnings import find_warnings
from filterfold.errors import RecordError


def _group(label: str, top1: list[float], seconds: list[float] | None = None, macs: int | None = None, **more):
    times = seconds or [None] * len(top1)
    results = [{"top1": a, "inference_seconds": b, "macs": macs} for a, b in zip(top1, times, strict=True)]
    return [{"method": label, "label": label, "seed": i, "result": r} | more for i, r in enumerate(results)]


BASE = _group("dense", [90.0, 90.1, 89.9, 90.05, 89.95], [10.0, 10.1, 9.9, 10.05, 9.95], 1000)


@pytest.mark.parametrize(
    ("top1", "word"),
    [
        ([90.0, 90.1, 89.9, 90.1, 89.9], "no worse"),
        ([91.0, 91.1, 90.9, 91.05, 90.95], "better"),
        ([89.75, 89.85, 89.65, 89.8, 89.7], "lower within the margin"),
        ([88.0, 88.1, 87.9, 88.05, 87.95], "worse"),
        ([91.5, 88.0, 90.5, 89.0, 90.0], "not shown"),
        ([90.0], "not shown"),
    ],
)
def test_words_for_accuracy(top1, word):
    [study] = studies(BASE + _group("small", top1))
    [judgement] = judge(study)
    assert judgement.accuracy == word
    assert judgement.pace == "not measured"
    assert "inference time was not measured" in sentence(judgement)


@pytest.mark.parametrize(
    ("seconds", "word"),
    [
        ([5.0, 5.1, 4.9], "faster"),
        ([20.0, 21.0, 20.5], "slower"),
        ([9.0, 11.0, 10.1], "not shown"),
        ([5.0], "not shown"),
    ],
)
def test_words_for_time(seconds, word):
    [study] = studies(BASE + _group("small", [90.0] * len(seconds), seconds))
    [judgement] = judge(study)
    assert judgement.pace == word
    assert headline(study, [judgement]).startswith("Against dense, with small ")


def test_the_margin_decides():
    trials = BASE + _group("small", [89.3, 89.4, 89.2, 89.35, 89.25])
    words = [judge(studies(trials)[0], margin)[0].accuracy for margin in (0.5, 1.0)]
    assert words == ["worse", "lower within the margin"]


def test_many_methods_are_held_to_a_stricter_level():
    close = [89.82, 90.0, 89.6, 89.5, 89.9]
    alone = judge(studies(BASE + _group("m0", close))[0])[0]
    many = [record for i in range(8) for record in _group(f"m{i}", close)]
    together = judge(studies(BASE + many)[0])[0]
    assert (alone.accuracy, together.accuracy) == ("no worse", "not shown")
    assert together.p_not_worse == pytest.approx(8 * alone.p_not_worse)
    assert "corrected for the number of settings" in sentence(together)


def test_trials_that_went_on_from_the_control_are_paired():
    went_on = {"history": [{"phase": "train"}, {"phase": "retrain"}]}
    drops = [90.0 - 0.2, 90.1 - 0.21, 89.9 - 0.19, 90.05 - 0.2, 89.95 - 0.2]
    [paired] = judge(studies(BASE + _group("l1", drops, **went_on))[0])
    [loose] = judge(studies(BASE + _group("l1", drops))[0])
    assert (paired.paired, loose.paired) == (True, False)
    assert paired.tost.high - paired.tost.low < loose.tost.high - loose.tost.low
    shuffled = _group("l1", drops, **went_on)[::-1]
    assert judge(studies(BASE + shuffled)[0])[0].tost == paired.tost
    four = judge(studies(BASE + shuffled[1:])[0])[0]  # one failed: the others have their pairs
    assert four.paired
    assert four.tost.n == (4, 4)
    assert four.top1.value == pytest.approx(-0.2)
    strangers = [record | {"seed": record["seed"] + 10} for record in shuffled]
    assert not judge(studies(BASE + strangers)[0])[0].paired


def test_controls_and_their_absence():
    named = [record | {"method": "baseline", "label": "baseline"} for record in BASE]
    assert studies(named + _group("small", [90.0]))[0].control == "baseline"
    assert studies(BASE + _group("small", [90.0]), control="small")[0].control == "small"
    [study] = studies(_group("a", [1.0, 2.0]) + _group("b", [1.0, 2.0]))
    assert study.control is None
    assert judge(study) == []
    assert "no control" in headline(study, [])
    with pytest.raises(RecordError, match="no record"):
        studies([])
    with pytest.raises(RecordError, match="neither label nor method"):
        studies([{"id": "x"}])


def test_models_and_data_sets_are_kept_apart():
    other = [record | {"data": "digits", "model": "vgg_small"} for record in BASE]
    found = studies(BASE + other)
    assert [study.title for study in found] == ["", "vgg_small on digits"]
    assert [len(study.trials) for study in found] == [5, 5]
    assert len(verdict(BASE + other)) == 2


def test_measures_of_records_old_and_new(make):
    new, old = make("dense", 0), make("dense", 1)
    for key in ("train_images", "train_macs"):
        del old["result"][key]
    del old["timing"]["batches"]
    [study] = studies([new, old])
    [group] = study.groups
    assert group.values(TRAIN_IMAGES) == [44_928 * 30]
    assert group.values(TRAIN_MACS) == [3 * 44_928 * 30 * 313_201_664]
    assert study.batch_sizes == [1, 8, 64, 512]
    assert group.values(call_seconds(8)) == [statistics.median(new["timing"]["batches"]["8"])]
    assert studies([make("dense", 0, top1=float("nan"))])[0].groups[0].values(TOP1) == []


def test_a_speed_up_beyond_the_saved_work_is_suspect():
    small = _group("small", [90.0] * 5, [2.0, 2.02, 1.98, 2.01, 1.99], 500)
    [study] = studies(BASE + small)
    judgements = judge(study)
    assert judgements[0].suspicious
    [warning] = [r for r in find_warnings(study, judgements) if r.suspects]
    assert warning.suspects == ("small",)
    assert "5.00× at 2.00×" in warning.text
    honest = [record | {"result": record["result"] | {"macs": 150}} for record in small]
    assert not any(r.suspects for r in find_warnings(*_judged(BASE + honest)))


def _judged(records):
    [study] = studies(records)
    return study, judge(study)


def test_what_the_document_claims_and_what_follows(reference):
    records = read_table(reference / "figures_4_5.csv")
    study, judgements = _judged(records)
    assert study.control == "original"
    assert [j.pace for j in judgements] == ["faster"] * 6
    assert [j.accuracy for j in judgements] == ["not shown"] * 6
    texts = {one.title: one.text.replace("\u00a0", " ") for one in find_warnings(study, judgements)}
    dose = texts["A speed-up that does not depend on what is left"]
    assert "4.84 s with 5 clusters and 5.15 s with 30" in dose
    dunn = texts["Inference time: Dunn’s test loses its significance under Holm"]
    assert "6 are under .05 uncorrected (up to p = .0206)" in dunn
    assert "1 (online clustering k=25, p = .0384)" in dunn
    equal = texts["“No significant difference” is not “equal”"]
    assert "p = .1979" in equal
    assert "shown for none" in equal
    pooled = texts["All settings of online clustering together"]
    assert "88.604 against 89.302" in pooled
    assert "−0.698 points" in pooled
    assert "p = .0222" in pooled
    lines = verdict(records)
    assert lines[0].startswith(
        "No setting is shown to be both faster and no worse. Of 6 settings, all are shown to be faster"
    )
    assert "none is shown to be no worse in top-1" in lines[0]
    assert any(line.startswith("Warning: A speed-up that does not depend") for line in lines)


def test_what_n_can_show_is_said():
    trials = BASE + _group("small", [91.5, 88.0, 90.5, 89.0, 90.0])
    words = power_words(_judged(trials)[1])
    assert words.startswith("With 5 against 5 trials and a spread of 0.9")
    assert "“no worse within 0.5 points”" in words
    assert "points can’t be seen reliably" in words
    assert power_words(_judged(BASE + _group("small", [90.0]))[1]) is None
    # the fact sheet's case: a spread of .15 and five trials a side, and a loss under .3 goes unseen
    places = (-1.5, -0.5, 0.0, 0.5, 1.5)
    same = [90 + 0.15 * x / statistics.stdev(places) for x in places]
    few = power_words(_judged(_group("dense", same) + _group("small", same[::-1]))[1])
    assert few.startswith(
        "With 5 against 5 trials and a spread of 0.15 points between trials, a loss under 0.30 points"
    )
    # paired: the spread of the differences counts
    went_on = {"history": [{"phase": "train"}, {"phase": "retrain"}]}
    drops = [x - 0.2 + d for x, d in zip(same, (0.01, -0.01, 0, 0.02, -0.02), strict=True)]
    paired = power_words(_judged(_group("dense", same) + _group("l1", drops, **went_on))[1])
    assert paired.startswith("Of l1, with 5 pairs of trials and a spread of 0.02 points between their differences")


def test_caveats_of_timing_and_origin(make):
    alone = {"timing": {"mode": "alone"}}
    records = [make("dense", 0, **alone), make("l1", 0, **alone)]
    records[1]["environment"] = records[1]["environment"] | {"processor": "Another", "commit": "fff", "dirty": True}
    records.append(make("l1", 1, status="failed"))
    titles = [one.title for one in find_warnings(*_judged(records))]
    for title in (
        "Times were not measured side by side",
        "Different machines",
        "Different versions of the code",
        "Uncommitted changes",
        "Failed trials are left out",
    ):
        assert title in titles
    clean = [r.title for r in find_warnings(*_judged([make("dense", 0), make("l1", 0)]))]
    assert not {"Times were not measured side by side", "Different machines", "Uncommitted changes"} & set(clean)
