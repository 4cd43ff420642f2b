"""Features and metrics against slow twins written from their definitions."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from swapless.predict.counts import CountTable, pairs
from swapless.predict.features import FADES, TokenMemory
from swapless.predict.metrics import Tally
from swapless.predict.vocabulary import MOST_GROUPS, Vocabulary, letter_groups
from tests.predict.made import made_trace


def _count(trace, rows):
    """Choices (L, E) summed over rows, in plain loops."""
    counts = [[0.0] * trace.num_experts for _ in range(trace.num_moe_layers)]
    for row in rows:
        for layer in range(trace.num_moe_layers):
            for expert in trace.expert_ids[row, layer]:
                if expert >= 0:
                    counts[layer][expert] += 1
    return np.array(counts)


def _slow(train, document, t, own, least_pairs=2):
    """The blocks of token t of ``document`` from their definition; with ``own`` the document's number in the training trace."""
    words, learned = document.tokens, train.tokens
    known = set(learned)
    others = [row for row in range(len(train)) if own is None or train.document[row] != own]
    share = _count(train, range(len(train))) / len(train) + 1e-3
    single = [row for row in others if learned[row] == words[t]]

    def pair_rows(rows):
        if t == 0 or words[t] not in known or words[t - 1] not in known:
            return []
        same = [r for r in rows if r and train.document[r] == train.document[r - 1]]
        return [r for r in same if (learned[r - 1], learned[r]) == (words[t - 1], words[t])]

    pair = pair_rows(others) if len(pair_rows(range(len(train)))) >= least_pairs else []
    met = [s for s in range(t) if words[s] == words[t] and words[t] in known]
    prior = (_count(train, single) + share) / (len(single) + 1)
    joint = (_count(train, pair) + prior) / (len(pair) + 1)
    here = (_count(document, met) + joint) / (len(met) + 1)
    blocks = [np.log(prior / share) / 2, np.log(joint / prior) / 2, np.log(here / joint) / 2]
    blocks.append(_count(document, [t - 1] if t else []))
    for fade in FADES.tolist():
        fading = sum((_count(document, [s]) * (1 - fade) * fade ** (t - 1 - s) for s in range(t)), np.zeros_like(share))
        blocks.append(3 * (fading - share))
    numbers = [len(single), len(pair), len(met)]
    return np.stack(blocks), [math.log1p(n) / 2 for n in numbers]


@pytest.mark.parametrize("own", [True, False])
def test_blocks_are_what_they_are_defined_to_be(own):
    train = made_trace()
    memory = TokenMemory.of(train, Vocabulary.of(train, "token"))
    document = train.rows(train.document == 3)
    if not own:
        document = made_trace(lengths=(20,), seed=9, token=["the", " new", " cat", " cat", "."] * 4)
    words = memory.vocabulary.encode(document)
    inputs = memory.inputs(document.expert_ids, words, own=own)
    for t in (0, 1, 5, 13, 19):
        blocks, numbers = _slow(train, document, t, 3 if own else None)
        assert np.abs(inputs.blocks[:, t] - blocks).max() < 2e-5
        assert inputs.scalars[t, :3] == pytest.approx(numbers, abs=1e-6)
    assert np.array_equal(inputs.chosen.sum(axis=2), np.full((len(document), 4), 2))


def test_count_tables_keep_their_counts_through_a_file():
    train = made_trace()
    words = Vocabulary.of(train, "token").encode(train)
    for keys, least in ((words, 1), (pairs(words, train.document), 2)):
        table = CountTable.of(keys, train.expert_ids, train.num_experts, least=least)
        again = CountTable.restored("x", table.arrays("x"), table.counts.shape[1])
        for name in ("keys", "totals", "counts"):
            assert np.array_equal(getattr(again, name), getattr(table, name))
        assert table.counts.sum() == table.totals.sum() * 4 * 2
        key = int(table.keys[0])
        assert np.array_equal(table.counts[0].reshape(4, 8), _count(train, np.flatnonzero(keys == key)))


def test_vocabulary_survives_odd_texts():
    words = ["", "\ud800", "Ġcenter", "naïve 🙂", "a\nb"]
    vocabulary = Vocabulary("token", words)
    assert Vocabulary.restored("token", vocabulary.arrays()).words == words
    groups = letter_groups(words, 50)
    assert groups.shape == (5, MOST_GROUPS) and groups.min() >= 0 and groups.max() <= 50
    assert (letter_groups(["Ġcat"], 50) == letter_groups([" cat"], 50)).all()


def test_metrics_against_plain_loops():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (30, 3, 8)).astype(np.float32) / 6  # many ties
    chosen = (rng.random((30, 3, 8)) < 0.25).astype(np.uint8)
    tally = Tally(3, 8, 2, ("a",))
    for rows in (slice(0, 11), slice(11, 30)):
        tally.add(scores[rows], chosen[rows], np.arange(30)[rows], np.where(np.arange(30) % 2, 0, -1)[rows])
    precisions, exact, hits = [], [], np.zeros(8)
    for t in range(30):
        for layer in range(3):
            order = sorted(range(8), key=lambda e: (-scores[t, layer, e], e))
            right = [chosen[t, layer, e] for e in order]
            hits += np.cumsum(right)
            wanted = sum(right)
            if wanted:
                precisions.append(sum(right[k] * sum(right[: k + 1]) / (k + 1) for k in range(8)) / wanted)
                exact.append(sum(right[:wanted]) == wanted)
    rows = tally.rows([2, 8], predictor="x", lead=1)
    assert rows[0]["recall"] == pytest.approx(hits[1] / chosen.sum())
    assert rows[0]["precision"] == pytest.approx(hits[1] / (30 * 3 * 2))
    assert rows[1]["recall"] == 1
    assert rows[0]["average_precision"] == pytest.approx(np.mean(precisions), rel=1e-5)
    assert rows[0]["exact_set_rate"] == pytest.approx(np.mean(exact))
    assert sum(item["tokens"] for item in rows[0]["positions"]) == 30
    assert {item["domain"]: item["tokens"] for item in rows[0]["domains"]} == {"a": 15, None: 15}
    from sklearn.metrics import accuracy_score, f1_score

    said = np.zeros_like(chosen)
    for t in range(30):
        for layer in range(3):
            said[t, layer, sorted(range(8), key=lambda e: (-scores[t, layer, e], e))[:2]] = 1
    published = rows[0]["moe_beyond"]
    true, nothing = chosen.reshape(-1), np.zeros(chosen.size)
    assert published["accuracy"] == pytest.approx(accuracy_score(true, said.reshape(-1)))
    assert published["macro_f1"] == pytest.approx(f1_score(true, said.reshape(-1), average="macro"))
    assert published["all_zeros_accuracy"] == pytest.approx(accuracy_score(true, nothing))
    assert published["all_zeros_macro_f1"] == pytest.approx(f1_score(true, nothing, average="macro"))


def test_importing_predictors_imports_no_torch():
    from swapless.predict import PREDICTORS

    probe = "import sys\nfrom swapless.predict import PREDICTORS, evaluate, saved, stream\n"
    probe += f"[PREDICTORS.get(name) for name in {PREDICTORS.names()!r}]\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
