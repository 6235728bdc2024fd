"Two processes that share a run end where one ends, with replicas and sharded, and there really were two"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch, torch.distributed as dist
from safetensors.torch import load_file
from ftlab.adapters.store import load_delta
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, logits, same, toy, weights
from two import CASES, HOW, SHARDED, one, weights_of

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()),
                                reason='this PyTorch has no gloo')
KEYS = [*CASES, *(f'{n} sharded' for n in SHARDED)]

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes left behind: (folder, what the first and the second told)"
    out = tmp_path_factory.mktemp('two')
    script = Path(__file__).with_name('two.py')
    r = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         script, out],
        capture_output=True, text=True, timeout=560,
        env=os.environ | dict(ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'))
    assert r.returncode == 0, r.stderr[-4000:]
    return out, [json.loads((out/f'told-{i}.json').read_text()) for i in range(2)]

class Norms(list):
    def after_step(self, state):
        self.append(state.extra.get('grad_norm'))

def distance(got, want) -> float:
    "Root mean square of the differences of two sets of weights"
    off = sum((got[n] - want[n]).square().sum() for n in want)
    return float((off/sum(p.numel() for p in want.values()))**.5)

def test_there_were_two(two):
    _, (a, b) = two
    assert a['collective'] == b['collective'] == 1 + 2
    for k in KEYS:
        x, y = a[k], b[k]
        assert (x['world'] == y['world'] == 2 and x['all'] == 8
                and len(x['rows']) == len(y['rows']) > 0)
        if k != 'grpo':
            # different rows, as the data have no row twice in four steps
            assert not {tuple(r) for r in x['rows']} & {tuple(r) for r in y['rows']}

@pytest.mark.parametrize('key', KEYS)
def test_two_processes_end_where_one_ends(two, key):
    out, told = two
    name, norms = key.removesuffix(' sharded'), Norms()
    run = one(name, accumulate=2, callbacks=(norms,))
    got, want = load_file(out/f'{key}.safetensors'), weights_of(run)
    if run.models:
        want |= {f'learner.{n}': p for n, p in run.models['head'].named_parameters()}
    assert (got.keys() == want.keys()
            and any((want[n] != toy().state_dict().get(n, 0)).any() for n in want))
    # AdamW makes a whole step of a gradient that is nothing but rounding,
    # so the root mean square is compared, in units of the rate
    off = distance(got, want)
    assert off < 1e-4*HOW['lr'], off
    for t in told:
        # both hold the same, to the last bit, as a plain model
        assert t[key]['plain'] and t[key]['off'] and t[key]['sums'][0] == t[key]['sums'][1]
        for x, y in zip(t[key]['log'], run.log, strict=True):
            assert (x.keys() == y.keys()
                    and all(x[k] == y[k] or x[k] == pytest.approx(y[k], rel=1e-4, abs=1e-6)
                            for k in x))
        # AdamW and clipping hide a mean in the place of a sum: the length of the gradient before both does not
        assert (t[key]['norms'] == norms == [None]*4
                or t[key]['norms'] == pytest.approx(norms, rel=1e-3) and max(norms) > HOW['clip'])
    assert told[0][key]['log'] == told[1][key]['log'] and told[0][key]['path'] == told[1][key]['path']
    fresh = toy()
    load_delta(fresh, out/f'{key}.delta')
    torch.testing.assert_close(logits(fresh), logits(run.model), atol=1e-3, rtol=0)

def test_only_the_first_writes_and_a_killed_run_goes_on(two):
    out, (a, b) = two
    want = weights_of(one('full', accumulate=2))
    for shard in (False, True):
        assert ('stopped here' in a[f'killed {shard}'] and a[f'steps {shard}'] == 4
                and a[f'files {shard}'] == ['checkpoint.safetensors', 'originals.safetensors'])
        assert (a[f'tracked {shard}'] == ['config', 0, 1, 'finish']
                or a[f'tracked {shard}'] == ['config', 0, 1, 2, 'finish'])
        assert b[f'tracked {shard}'] == []
        got = load_file(out/f'resumed {shard}.safetensors')
        assert distance(got, want) < 1e-4*HOW['lr']

def test_what_two_processes_cannot_do_is_refused_by_both(two):
    for t in two[1]:
        assert ('batch_size is 7 and accumulate 2' in t['uneven']
                and '1 micro-batches, which 2 processes cannot share' in t['one batch']
                and "never calls state.emit('after_backward')" in t['secret'])
        for shard in (False, True):
            # in one process only, but both stop
            assert t[f'not finite {shard}'].startswith('NotFinite: the loss is nan at step 2')

def test_sharding_needs_several_processes():
    with pytest.raises(ValueError, match='torchrun --nproc_per_node 2'):
        fit(m := toy(), TOK, lab_data(), steps=1, shard=True, progress=False)
    assert same(weights(m), weights(toy()))
