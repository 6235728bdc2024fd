"The winner of a comparison: the rule on numbers made by hand, and runs of tiny models from end to end"
import copy, json
import pytest, torch
import ftlab
from ftlab import cli
from ftlab.core.data import data
from ftlab.core.mix import mix, read_again, read_mix
from ftlab.core.recipe import unsaid_options
from ftlab.instruments.compare import Comparison, compare, method_row
from ftlab.instruments.report import read_run
from ftlab.instruments.winner import _recipe_again, choose
from ftlab.methods import get
from toys import TOK, toy

# ---- the rule

def mean(x):
    return dict(mean=sum(x)/len(x), low=None, high=None)

def method(name, gain, lost, seconds=1., within=None, matched=None):
    matched = lost if matched is None else matched
    seeds = [dict(gain=g, forgetting=f, forgetting_matched=m, seconds=seconds, error=None)
             for g, f, m in zip(gain, lost, matched)]
    return dict(name=name, rate=1e-3, seeds=seeds, gain=mean(gain), forgetting=mean(lost),
                within=within)

def result(*methods, limit=None, how='old data', target=.3):
    return dict(lose_at_most=limit, target=target, methods=methods, protocol=dict(forgetting=how))

def within(gain, lost, dose=1., step=8):
    return dict(rate=2e-3, step=step, dose=dose, gain=mean([gain]), forgetting=mean([lost]))

LEVEL = [.60, .58, .62], [.59, .60, .60]

def test_a_method_that_clearly_gains_more_wins_whatever_it_forgets():
    found = choose(result(method('a', [.6, .61, .6], [.3]*3), method('b', [.3, .31, .29], [.0]*3)))
    assert found.method == 'a' and 'clearly more' in found.why and found.step is None

def test_among_methods_level_in_gain_the_one_that_forgets_least_at_equal_gain_wins():
    a, b = method('a', LEVEL[0], [.2, .22, .19]), method('b', LEVEL[1], [.1, .11, .1], seconds=9.)
    found = choose(result(a, b))
    assert found.method == 'b' and 'cannot be told apart' in found.why
    assert 'forgets least at equal gain' in found.why
    assert choose(result(a, b, how='drift (KL)')).why.endswith('b drifts least at equal gain')

def test_equal_gain_and_not_the_end_of_the_run_decides():
    a = method('a', LEVEL[0], [.0]*3, matched=[.2, .21, .2])
    b = method('b', LEVEL[1], [.5]*3, matched=[.1, .11, .1])
    assert choose(result(a, b)).method == 'b'
    assert choose(result(a, b, target=None)).method == 'a', 'without an equal gain, the end of the run'

def test_a_tie_is_said_and_the_faster_method_taken():
    a = method('a', LEVEL[0], [.1, .2, .15], 5.)
    b = method('b', LEVEL[1], [.2, .1, .16], 2.)
    found = choose(result(a, b))
    assert found.method == 'b' and 'fewest seconds' in found.why
    assert 'what a, b lose at equal gain cannot be told apart (a - b: -0.' in found.why

def test_two_seeds_decide_by_means_and_the_sentence_says_so():
    found = choose(result(method('a', [.6, .5], [.3]*2), method('b', [.5, .5], [.0]*2)))
    assert found.method == 'a' and 'by chance' in found.why

def test_within_a_limit_the_best_gain_wins_with_its_dose():
    a = method('a', [.9]*3, [.3]*3, within=within(.4, .019, dose=.5))
    b = method('b', [.5]*3, [.0]*3, within=within(.5, .03))
    found = choose(result(a, b, limit=2.))
    assert (found.method, found.rate, found.step, found.dose) == ('a', 2e-3, 8, .5), 'b loses more on the test rows'
    assert '50% of its change' in found.why

def test_what_is_refused():
    a = method('a', [-.1]*3, [.0]*3)
    for made, say in [(dict(), 'no method gains'), (dict(lose_at_most=1.), 'made without'),
                      (dict(method='c'), 'the comparison has a')]:
        with pytest.raises(ValueError, match=say):
            choose(result(a), **made)
    with pytest.raises(ValueError, match='within 2 points'):
        choose(result(method('a', [.5]*3, [.3]*3, within=within(.4, .05)), limit=2.))

def test_a_method_that_broke_down_does_not_win():
    a, b = method('a', [.9]*3, [.0]*3), method('b', [.3]*3, [.3]*3)
    a['seeds'][1]['error'] = 'NotFinite'
    assert choose(result(a, b)).method == 'b'

# ---- the data are read again

def test_data_say_where_they_came_from(tmp_path, monkeypatch):
    rows = [dict(q=f'{i}', response='b', note=1) for i in range(40)]
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    monkeypatch.chdir(tmp_path)
    d = data('my.jsonl', columns=dict(prompt='q'), carry='note', n=9, seed=3)
    again = json.loads(json.dumps(d.origin))
    monkeypatch.chdir('/')
    assert read_again(again, tmp_path).fingerprint == d.fingerprint
    assert data([dict(prompt='a', response='b')]*30).origin is None
    drawn = data('sort', n=20, seed=4)
    assert read_again(drawn.origin).fingerprint == drawn.fingerprint

# ---- from end to end

FAST = dict(steps=6, batch_size=4, items=8, old_items=4, validation_items=8,
            old_validation_items=4, progress=False,
            metric='nll')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A comparison of a saved toy on a file, as the command line makes it"
    at = tmp_path_factory.mktemp('winner')
    toy().save_pretrained(at/'model')
    TOK.save_pretrained(at/'model')
    d = data('new-procedure', n=40)
    rows = d.train + d.validation[:14] + d.test[:14]
    (at/'my.jsonl').write_text(''.join(json.dumps(dict(q=r['prompt'], response=r['response'])) + '\n' for r in rows))
    d = data(at/'my.jsonl', columns=dict(prompt='q'))
    found = compare(['full', 'lora'], at/'model', d, seeds=2, lrs=[1e-2, 3e-2], max_runs=18,
                    lose_at_most=90,
                    old='sort', out=at/'compare', **FAST | dict(metric='nll'))
    return at, found

def test_the_winner_is_the_run_that_was_measured(made):
    _, found = made
    row = next(m for m in found.result['methods'] if m['name'] == 'full')
    plain = Comparison(copy.deepcopy(found.result) | dict(lose_at_most=None), found.bench,
                       found.recipes)
    run = plain.train('full', progress=False)
    from ftlab.instruments.bench import score
    d = found.bench.given
    now = score('nll', run.model, run.tok, d.test[:8], d)
    assert now - row['seeds'][0]['before'] == pytest.approx(row['seeds'][0]['gain'], abs=1e-6)

def test_read_from_the_file_alone_it_is_the_same(made, tmp_path, monkeypatch):
    at, found = made
    monkeypatch.chdir(tmp_path)
    a = found.train('lora', progress=False)
    b = Comparison.read(at/'compare'/'result.json').train('lora', tmp_path/'run', progress=False)
    x, y = a.delta.tensors(), b.delta.tensors()
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    z = read_run(tmp_path/'run').delta.tensors()
    assert all(torch.allclose(z[k], y[k], atol=1e-6) for k in y), 'a saved winner is read like any run'

def test_a_point_within_a_limit_is_trained_as_it_was_measured(made):
    _, found = made
    r = copy.deepcopy(found.result)
    row = next(m for m in r['methods'] if m['name'] == 'full')
    row['within'] = dict(rate=1e-2, step=3, dose=1., gain=mean([.1]), forgetting=mean([.0]))
    short = Comparison(r, found.bench, found.recipes).train('full', progress=False)
    assert len(short.log) == 3 and short.log[2]['lr'] > 0, 'the schedule is that of the whole run'

def test_steps_between_evaluations_in_an_older_file_are_not_those_of_fit(made):
    _, found = made
    r = copy.deepcopy(found.result)
    r['protocol']['evaluate_every'] = 2 # which a comparison recorded before `evaluations`
    again = Comparison(r, found.bench, found.recipes).train('full', progress=False)
    assert again.kept is None and len(again.log) == r['protocol']['steps']

@pytest.mark.parametrize('name', ['full', 'lora', 'pissa', 'dora', 'vera'])
def test_a_dose_of_each_kind_of_change(made, name):
    "PiSSA is a LoRA whose `B` does not start at zero, so half of its `B` is not half of its change"
    _, found = made
    r = copy.deepcopy(found.result)
    row = next(m for m in r['methods'] if m['name'] == ('full' if name == 'full' else 'lora'))
    row['name'] = name
    point = dict(rate=1e-2, step=6, gain=mean([.1]), forgetting=mean([.0]))
    def at(dose):
        only = r | dict(methods=[row | dict(within=point | dict(dose=dose))])
        again = Comparison(only, found.bench, {name: ftlab.methods.get(name)})
        run = again.train(name, progress=False)
        return {n: c.clone() for n, c in run.delta.attached.changes().items()}
    full, half = at(1.), at(.5)
    assert max(c.abs().max() for c in full.values()) > 1e-3
    assert all(torch.allclose(half[k], full[k]/2, atol=1e-6) for k in full)

def test_changed_rows_and_another_model_are_refused(made, tmp_path):
    at, found = made
    read = Comparison.read(at/'compare'/'result.json')
    rows = (at/'my.jsonl').read_text().splitlines()[:-1]
    (tmp_path/'fewer.jsonl').write_text('\n'.join(rows))
    with pytest.raises(ValueError, match='not those of the comparison'):
        read.train('full', data=data(tmp_path/'fewer.jsonl', columns=dict(prompt='q')),
                   progress=False)
    with pytest.raises(ValueError, match='the model is not the one of the comparison'):
        read.train('full', model=(toy(seed=1), TOK), progress=False)
    changed = copy.deepcopy(read.result)
    next(m for m in changed['methods'] if m['name'] == 'lora')['recipe']['arguments']['r'] = 5
    with pytest.raises(ValueError, match='is not what it was'):
        Comparison(changed).train('lora', progress=False)
    with pytest.raises(ValueError, match='is not what it was'):
        read.train('lora', recipe='lora(r=5)', progress=False)

def test_a_method_named_as_another_that_describes_itself_alike_is_not_trained_as_that_one():
    row = method_row('pissa', get('olora').named('pissa').describe(), [],
                     options=unsaid_options(get('olora').named('pissa')))
    with pytest.raises(ValueError, match="'start': 'olora'.* then, .*'start': 'pissa'.* now"):
        _recipe_again(row, {}, None)
    assert _recipe_again(row, {}, get('olora').named('pissa')).name == 'pissa'
    del row['options'] # of an earlier ftlab
    assert _recipe_again(row, {}, None).name == 'pissa'

def test_an_older_result_asks_for_model_and_data(made):
    at, found = made
    old = {k: v for k, v in found.result.items() if k != 'inputs'}
    with pytest.raises(ValueError, match='give them: data='):
        Comparison(old).train('full', progress=False)
    d = data(at/'my.jsonl', columns=dict(prompt='q'))
    with pytest.raises(ValueError, match='give it: model='):
        Comparison(old).train('full', data=d, progress=False)
    run = Comparison(old).train('full', data=d, model=at/'model', progress=False)
    assert run.log

def test_the_command_needs_the_folder_alone(made, tmp_path, capsys, monkeypatch):
    at, _ = made
    monkeypatch.chdir(tmp_path)
    asked = ['winner', str(at/'compare'), '--method', 'lora', '--out', 'run', '--export', 'tuned']
    assert cli.main([*asked, '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['why'].startswith('lora was asked for') and said['before'] > said['after']
    model, _ = ftlab.load('tuned')
    assert cli.main(['winner', str(at/'compare'), '--out', 'run']) == 1
    assert 'name a new folder' in capsys.readouterr().err
    assert cli.main(['winner', str(at/'compare'), '--out', 'x', '--eval', 'y']) == 1
    assert '--eval belongs to --data' in capsys.readouterr().err

# ---- the point that is trained is the point that was measured

def test_a_point_from_shorter_tuning_is_trained_as_it_was_measured(made, tmp_path):
    from ftlab.instruments.bench import score
    at, _ = made
    d = data(at/'my.jsonl', columns=dict(prompt='q'))
    found = compare(['full'], at/'model', d, seeds=1, lrs=[1e-2, 3e-2], max_runs=5, tune_steps=5,
                    lose_at_most=100, old='sort', out=tmp_path/'c', **FAST)
    row = found.result['methods'][0]
    run = found.train(progress=False)
    gain = score('nll', run.model, run.tok, d.test[:8], d) - row['seeds'][0]['before']
    assert gain == pytest.approx(row['within']['gain']['mean'], abs=1e-6)
    assert row['within']['step'] == len(run.log)

def test_an_older_result_that_names_a_step_of_the_tuning_run():
    path = [dict(step=s, gain=.1, forgetting=0.) for s in (0, 3, 6)]
    a = method('a', [.5]*3, [.0]*3, within=within(.4, .01, step=5))
    for s in a['seeds']:
        s['path'] = path
    assert choose(result(a, limit=2.)).step == 6
    a['within']['step'] = 3
    assert choose(result(a, limit=2.)).step == 3
    a['within']['dose'] = .5
    assert choose(result(a, limit=2.)).step == 6, 'a share was measured at the end'

def test_a_winner_on_a_mixture(tmp_path, monkeypatch):
    toy().save_pretrained(tmp_path/'model')
    TOK.save_pretrained(tmp_path/'model')
    d = data('sort', n=60)
    rows = [dict(q=r['prompt'], response=r['response']) for r in d.train + d.validation + d.test]
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    monkeypatch.chdir(tmp_path)
    shares = {'my.jsonl': .75, 'new-procedure': .25}
    d = read_mix(shares, columns=dict(prompt='q'))
    asked = ('compare --model model --data my.jsonl=.75,new-procedure=.25 --columns prompt=q --methods full '
             '--seeds 1 --lr 1e-2 --steps 2 --batch-size 4 --items 4 --old sort --old-items 4 --out c --metric nll')
    assert cli.main(asked.split()) == 0
    monkeypatch.chdir('/')
    monkeypatch.setattr('os.getcwd', lambda: '/')
    run = Comparison.read(tmp_path/'c'/'result.json').train(out=tmp_path/'run', progress=False)
    assert run.data.fingerprint == d.fingerprint and len(run.log) == 2
    assert read_run(tmp_path/'run').data.fingerprint == d.fingerprint

def test_a_mixture_is_read_again_only_if_every_source_can_be(tmp_path):
    d = mix({'sort': .5, 'new-procedure': .5}, n=20, seed=3, evaluate='new-procedure')
    again = read_again(json.loads(json.dumps(d.origin)))
    assert again.fingerprint == d.fingerprint and again.note == d.note
    own = [dict(prompt=f'{i}', response='b') for i in range(40)]
    assert mix({'sort': .5, 'own': (own, .5)} | {'sort': ('sort', .5)}).origin is None

def test_what_would_only_fail_after_training_is_refused_before(made, tmp_path, capsys, monkeypatch):
    at, _ = made
    monkeypatch.chdir(tmp_path)
    for more, say in [('--method full --export e --form peft', 'cannot hold'),
                      ('--export run', 'are one folder'), ('--export run/e', 'one in the other')]:
        assert cli.main(['winner', str(at/'compare'), '--out', 'run', *more.split()]) == 1
        assert say in capsys.readouterr().err and not (tmp_path/'run').exists()
    for text, say in [('{}', 'is no result of a comparison'), ('{"methods": [', 'cannot be read as JSON')]:
        (tmp_path/'result.json').write_text(text)
        assert cli.main(['winner', 'result.json']) == 1
        said = capsys.readouterr().err
        assert say in said and 'result.json' in said

def test_a_run_is_not_written_over_a_file(made, tmp_path):
    (tmp_path/'run').write_text('old')
    with pytest.raises(FileExistsError, match="run' exists and is a file; name another path"):
        made[1].train('full', tmp_path/'run', progress=False)
    assert (tmp_path/'run').read_text() == 'old'

def test_the_device_of_the_comparison_is_used_or_its_absence_said(made):
    _, found = made
    r = copy.deepcopy(found.result)
    r['protocol']['device'] = 'mps'
    at, _ = made
    run = Comparison(r).train('full', model=at/'model', data=found.bench.given, progress=False)
    here = 'mps' if torch.backends.mps.is_available() else 'cpu'
    assert any('made on mps and this run on cpu' in n for n in run.notes) == (here == 'cpu')
