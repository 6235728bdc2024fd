"Methods that answer different questions combine: selections with edits, deltas with edits and losses, drawn at random"
import random
from itertools import product

import pytest
from ftlab import methods
from ftlab.core.recipe import CannotCompose
from test_contract import CHECKS, made

DRAWN = 6  # of each kind
NOT_HERE = {'adam8bit'}  # needs a package


def answering(*questions) -> list[str]:
    "The methods that answer all of these questions"
    names = (n for n in methods.names() if n not in NOT_HERE)
    return [n for n in names if all(getattr(made(n), q) is not None for q in questions)]


DELTAS, SELECTED, EDITS, LOSSES = map(answering, ('delta', 'select', 'edit', 'objective'))
ALONE = [n for n in SELECTED if n not in DELTAS]  # selections of what trains itself
UNWEIGHED = [n for n in ALONE if n not in LOSSES] # a loss beside a loss is refused
LOSSES = [n for n in LOSSES if n not in SELECTED] # those with a selection come to the last test
ON_ROWS = [n for n in LOSSES if not made(n).own_source]
READERS, CHOOSERS = ['got_d', 'pcp'], ['lofit', 'lt_sft'] # in stages; the second choose what trains


def drawn(*of) -> list[str]:
    """`DRAWN` combinations, one of each list; which they are changes as methods are added,
    and not from day to day"""
    every = [' * '.join(names) for names in product(*of)]
    return random.Random(len(every)).sample(every, min(DRAWN, len(every)))


def combined(names: str):
    first, *rest = (made(n) for n in names.split(' * '))
    for r in rest:
        first = first*r
    return first


def checked(names: str, promises, tmp_path) -> None:
    """Hold a combination to those of these promises that each part makes;
    or it is refused with a sentence that says why"""
    recipe = combined(names)
    kept = set(promises) & set(recipe.promises)
    try:
        for promise in sorted(kept):
            CHECKS[promise](recipe, tmp_path)
    except ValueError as e:  # an assertion that fails is none
        assert ' changes activations' in str(e) or ' acts on activations' in str(e), f'{names}: {e}'


@pytest.mark.parametrize('names', drawn(DELTAS, EDITS) + drawn(ALONE, EDITS))
def test_an_edit_follows_any_change(names, tmp_path):
    checked(names, ('frozen stays', 'off is the base', 'saves'), tmp_path)


@pytest.mark.parametrize('names', drawn(LOSSES, DELTAS) + drawn(LOSSES, UNWEIGHED))
def test_a_loss_trains_any_part(names, tmp_path):
    checked(names, ('frozen stays', 'saves'), tmp_path)


@pytest.mark.parametrize('names', drawn(LOSSES, DELTAS, EDITS))
def test_all_three_combine(names, tmp_path):
    checked(names, ('saves',), tmp_path)


@pytest.mark.parametrize('names', drawn(READERS, DELTAS + ALONE)
                         + drawn(READERS + CHOOSERS, ON_ROWS))
def test_every_stage_takes_a_change_or_a_loss(names, tmp_path):
    checked(names, ('frozen stays', 'saves'), tmp_path)


@pytest.mark.parametrize('names', drawn(ALONE, DELTAS))
def test_two_selections_are_refused_by_name(names):
    with pytest.raises(CannotCompose, match="both answer 'select'; use one of them"):
        combined(names)
