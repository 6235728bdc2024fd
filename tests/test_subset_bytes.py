"""What a subset costs in bytes: AdamW keeps 8 for each trained value and a count of steps for each
tensor, and the file has the values and where they are"""
import inspect

import pytest
from ftlab import methods
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, toy

SUBSETS = [n for n in methods.names()
           if methods.make_of(n).__module__.startswith('ftlab.adapters.subsets.')]
# arguments beside the budget: searches that end soon, blocks that fit, slices that move
SHORT = dict(memcontrol=dict(by='random'), nfts=dict(by='random'), lape=dict(by='random'),
             smt=dict(size=8), slicefine=dict(every=1), lift=dict(every=1),
             layernorm_tuning=dict(budget=.002))


def made(name):
    takes = inspect.signature(methods.make_of(name)).parameters
    budget = dict(budget=.02) if 'budget' in takes else {}
    return methods.make_of(name)(**budget | SHORT.get(name, {}))


class Most:
    "The most that the optimizer kept after a step, and for what"
    def __init__(self):
        self.kept = self.values = self.tensors = 0

    def after_step(self, state):
        kept = [t for of in state.optimizer.state.values() for t in of.values()]
        self.kept = max(self.kept, sum(t.nbytes for t in kept))
        params = state.attached.parameters().values()
        self.values = max(self.values, sum(p.numel() for p in params))
        self.tensors = max(self.tensors, len(params))


def in_file(att) -> int:
    "Bytes of a change: 4 a value, also of those left on the way, and where they are"
    return (sum(4*att.model.get_parameter(n).numel() for n in att.whole)
            + sum(map(of_delta, att.deltas.values())))


def of_delta(d) -> int:
    left = len(getattr(d, 'left_index', ()))
    values = sum(p.numel() for p in d.parameters())
    match d.kind:
        case 'entries':
            return 8*(values + left)
        case 'slices':
            lines = d.value.shape[d.dim]
            return 4*values//lines*(lines + left) + 8*(lines + left)
        case 'blocks':
            return 4*values + 16*len(d.value)
        case 'goodvibe': # a neuron, and the group that it shares values with
            return 4*values + 16*len(d.index)
        case 'r_amt.scores': # a bit for each entry of the weight, no value
            return (d.size + 7)//8
        case 'lowrank' | 'offset' | 'difffit': # whole weights
            return 4*values


@pytest.mark.parametrize('name', SUBSETS)
def test_optimizer_and_file_are_as_large_as_the_formula_says(name, tmp_path):
    most, recipe = Most(), made(name)
    run = fit(toy(), TOK, lab_data(), recipe, steps=3*len(recipe.turns), batch_size=2,
              callbacks=(most,), progress=False)
    assert most.values == run.cost['trainable'] > 0
    assert most.kept == 8*most.values + 4*most.tensors
    file = tmp_path/'change.safetensors'
    run.delta.save(file)
    header = int.from_bytes(file.read_bytes()[:8], 'little')
    assert file.stat().st_size == 8 + header + in_file(run.delta.attached)
