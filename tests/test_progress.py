"How long a comparison still takes: predicted from runs of the same method, whatever stopped early or was kept"

import pytest

from ftlab.instruments.progress import Remaining, Reporter, time_words


def outcome(**more) -> dict:
    return (
        dict(
            gain=0.5, forgetting=0.1, error=None, stopped=None, path=[dict(step=0), dict(step=100)]
        )
        | more
    )


def test_a_method_is_predicted_from_its_own_runs_and_else_from_all():
    rest = Remaining(['slow', 'quick'], dict(tuning=4, test=6), dict(tuning=5.0, test=5.0))
    assert rest.seconds() == 50 and rest.runs == 10
    rest.finished('slow', 'tuning', 10.0)
    assert rest.seconds() == 9 * 10, 'no other method has run yet'
    rest.finished('quick', 'tuning', 2.0)
    assert rest.seconds() == 1 * 10 + 3 * 10 + 1 * 2 + 3 * 2
    rest.finished('quick', 'test', 4.0)
    assert rest.seconds() == 4 * 10 + 1 * 2 + 2 * 4, (
        'a test run takes another time than a tuning run'
    )


def test_a_test_run_of_more_steps_is_expected_to_take_longer():
    rest = Remaining(['slow', 'quick'], dict(tuning=4, test=2), dict(tuning=2.0, test=20.0))
    assert rest.seconds() == 4 * 2 + 2 * 20
    rest.finished('slow', 'tuning', 3.0)
    assert rest.seconds() == 3 * 3 + 2 * 30, 'slower than expected by half'
    rest.finished('slow', 'test', 24.0)
    assert rest.seconds() == 1 * 3 + 2 * (3 + 2.4) / 2 + (30 + 24) / 2


def test_before_the_first_run_a_function_hears_how_many_there_are():
    heard = []
    Reporter(Remaining(['a'], dict(tuning=0, test=3)), heard.append).begins('at most 3 runs')
    (said,) = heard
    assert (said['run'], said['of'], said['left'], said['line']) == (0, 3, None, 'at most 3 runs')


def test_what_was_stopped_early_counts_as_the_time_of_all_its_steps():
    reporter = Reporter(Remaining(['a'], dict(tuning=2, test=0)), show=False)
    said = reporter.ran(
        'a',
        1e-3,
        1,
        'tuning',
        outcome(stopped='loss 9', path=[dict(step=0), dict(step=25)]),
        'drift',
        seconds=5.0,
        steps=100,
    )
    assert said['left'] == 20 and 'loss 9' in said['line']


@pytest.mark.parametrize(
    'how', [dict(seconds=None), dict(seconds=0.1, error='NotFinite: nan', path=[])]
)
def test_what_was_kept_or_crashed_says_nothing_about_time(how):
    rest = Remaining(['a'], dict(tuning=0, test=3), dict(tuning=1.0, test=10.0))
    reporter = Reporter(rest, show=False)
    said = reporter.ran(
        'a',
        1e-3,
        1,
        'test',
        outcome(**{k: v for k, v in how.items() if k != 'seconds'}),
        'drift',
        how['seconds'],
    )
    assert said['left'] == 20 and (said['run'], said['of']) == (1, 3)


def test_runs_that_the_search_did_not_need_are_no_longer_expected():
    rest = Remaining(['a', 'b'], dict(tuning=20, test=12), dict(tuning=1.0, test=1.0))
    rest.finished('a', 'tuning', 1.0)
    rest.tests(dict(a=3))
    assert rest.exact and rest.runs == 3 and rest.seconds() == 3
    for _ in range(3):
        rest.finished('a', 'test', 2.0)
    assert rest.seconds() == 0 == rest.runs


def test_without_any_measurement_nothing_is_predicted():
    rest = Remaining(['a'], dict(tuning=0, test=2))
    assert rest.seconds() is None
    said = Reporter(rest, show=False).ran('a', 1.0, 0, 'test', outcome(), 'drift')
    assert said['left'] is None and 'left' not in said['line']


def test_durations_are_said_in_the_unit_that_fits():
    assert [time_words(s) for s in (0, 89.4, 90, 5399, 5400)] == [
        '0 s',
        '89 s',
        '2 min',
        '90 min',
        '1.5 h',
    ]
