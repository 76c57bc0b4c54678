"""Recovery: the share of the gap between control and base that is closed, and where there is nothing to say."""

import math

import pytest

from liger_cli.evaluation.recovery import BASE_FAILS, NO_GAP, nats_gap, recall_gap, scale, task_gap


def _figure(value, stderr=None, better=True):
    return {"value": value, "stderr": stderr, "higher_is_better": better}


@pytest.mark.parametrize(("model", "closed"), [(2.0, 1.0), (3.0, 0.0), (2.5, 0.5), (4.0, -1.0)])
def test_of_losses(model, closed):
    """As good as the base is all, as good as the control nothing, and worse than the control less than nothing."""
    assert nats_gap(2.0, 3.0).closed_by(-model) == pytest.approx(closed)


def test_no_gap():
    assert nats_gap(2.0, 2.005).missing == NO_GAP and nats_gap(2.0, 2.005).closed_by(-2.0) is None
    assert nats_gap(2.0, 1.5).missing == NO_GAP
    assert recall_gap(0.9, 0.85).missing == NO_GAP


def test_a_base_that_recalls_by_chance():
    assert recall_gap(0.1, 0.0).missing == BASE_FAILS
    assert recall_gap(0.3, 0.0).closed_by(0.15) == pytest.approx(0.5)


def test_a_model_at_chance_recovers_nothing():
    """Two choices, a window that guesses: half of the base's 80 % is what anybody gets."""
    gap = task_gap("acc", _figure(0.8, 0.01), _figure(0.5, 0.01), chance=0.5)
    assert gap.closed_by(0.5) == 0.0 and gap.closed_by(0.45) < 0 and gap.closed_by(0.8) == pytest.approx(1.0)


def test_figures_within_their_error():
    assert task_gap("acc", _figure(0.52, 0.02), _figure(0.40, 0.02), chance=0.5).missing == BASE_FAILS
    assert task_gap("acc", _figure(0.60, 0.02), _figure(0.56, 0.02), chance=0.5).missing == NO_GAP
    assert task_gap("acc", _figure(0.60, 0.02), _figure(0.50, 0.02), chance=0.5).missing is None


def test_where_nothing_can_be_compared():
    assert task_gap("acc", _figure(0.8), _figure(0.5), chance=None) is None
    assert task_gap("acc", _figure(None), _figure(0.5), chance=0.5) is None
    assert task_gap("size", _figure(0.8, better=None), _figure(0.5, better=None), chance=0.0) is None


def test_perplexities_count_in_nats():
    """Half of the way from 16 to 4 is 8."""
    base, control, model = (_figure(value, better=False) for value in (4.0, 16.0, 8.0))
    gap = task_gap("word_perplexity", base, control, chance=0.0)
    assert gap.closed_by(scale("word_perplexity", model)) == pytest.approx(0.5)
    assert scale("word_perplexity", base) == pytest.approx(-math.log(4))
    assert scale("bits_per_byte", base) == -4.0
