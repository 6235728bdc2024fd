"Methods that answer different questions combine: selections with edits, deltas with edits and losses, drawn at random"
import random
from itertools import product

import pytest
from ftlab import methods
from ftlab.core.recipe import CannotCompose
from test_contract import CHECKS, Tuned, made

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
# in stages: some read before they train, some choose what trains, and some have rows and a loss of their own
READERS, CHOOSERS = ['got_d', 'pcp'], ['grafting', 'lofit', 'lt_sft']
PLAYERS = ['palm2_recipe', 'spin']
# these cannot train in a second stage: NFTs and Polyhistor act on activations, which cannot be folded, and SaRA on the
# toy finds no entry near 0 any more; Polyhistor also asks for the task of a row, which a stage with rows of its own
# does not know
ONCE = dict(nfts='acts on activations and cannot be folded', sara='the selection matches nothing',
            polyhistor='acts on activations and cannot be folded|the task of a row is not known')
CHANGES = [n for n in DELTAS + ALONE if n not in [*ONCE, *answering('source')]]
BARE = [n for n in CHANGES if n not in answering('objective')]
NO_DROPOUT = 'R-Drop compares two passes with different dropout, and this model has none'


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


def tuned(names: str) -> Tuned:
    return Tuned(combined(names))


def checked(names: str, promises, tmp_path) -> None:
    """Hold a combination to those of these promises that each part makes;
    or it is refused with a sentence that says why"""
    it = tuned(names)
    kept = set(promises) & set(it.recipe.promises)
    try:
        for promise in sorted(kept):
            CHECKS[promise](it, tmp_path)
    except ValueError as e:  # an assertion that fails is none
        known = ' changes activations', ' acts on activations', NO_DROPOUT
        assert any(why in str(e) for why in known), f'{names}: {e}'


@pytest.mark.parametrize('names', drawn(DELTAS, EDITS) + drawn(ALONE, EDITS))
def test_an_edit_follows_any_change(names, tmp_path):
    checked(names, ('frozen stays', 'off is the base', 'saves'), tmp_path)


@pytest.mark.parametrize('names', drawn(LOSSES, DELTAS) + drawn(LOSSES, UNWEIGHED))
def test_a_loss_trains_any_part(names, tmp_path):
    checked(names, ('frozen stays', 'saves'), tmp_path)


@pytest.mark.parametrize('names', drawn(LOSSES, DELTAS, EDITS))
def test_all_three_combine(names, tmp_path):
    checked(names, ('saves',), tmp_path)


@pytest.mark.parametrize('names', drawn(READERS, CHANGES) + drawn(CHOOSERS, ON_ROWS)
                         + drawn(READERS, ON_ROWS) + drawn(PLAYERS, BARE))
def test_every_stage_takes_a_change_or_a_loss(names, tmp_path):
    checked(names, ('frozen stays', 'saves'), tmp_path)


def test_every_method_in_stages_is_drawn_from():
    in_stages = {n for n in methods.names() if made(n).stages}
    assert in_stages == {*READERS, *CHOOSERS, *PLAYERS}


@pytest.mark.parametrize('player', PLAYERS)
@pytest.mark.parametrize('loss', ['asft', 'dft'])
def test_a_stage_with_a_loss_of_its_own_refuses_another(player, loss, tmp_path):
    with pytest.raises(ValueError, match=r"stage \d of \d .*both answer 'objective'"):
        CHECKS['saves'](tuned(f'{player} * {loss}'), tmp_path)


@pytest.mark.parametrize('stages', READERS + PLAYERS)
@pytest.mark.parametrize('change', ONCE)
def test_what_no_second_stage_can_train_is_refused_with_the_reason(stages, change, tmp_path):
    with pytest.raises(ValueError, match=ONCE[change]):
        CHECKS['saves'](tuned(f'{stages} * {change}'), tmp_path)


@pytest.mark.parametrize('names', drawn(ALONE, DELTAS))
def test_two_selections_are_refused_by_name(names):
    with pytest.raises(CannotCompose, match="both answer 'select'; use one of them"):
        combined(names)
