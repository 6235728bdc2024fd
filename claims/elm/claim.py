"An ELM neuron beside an LSTM of its size and beside itself without slow memories, on a synthetic neuron"
import math
import torch
from ftlab.beyond.brain.elm import ARMS, ELM, elm, imitate, neuron, score
from ftlab.instruments.compare import tune as choose

GRID, STEPS = (3e-3, 1e-2, 3e-2), 250

def tune() -> dict:
    return choose(lambda arm, rate: score(imitate(arm, rate, 10_000, STEPS), 10_000, 'validation'),
                  {arm: GRID for arm in ARMS})

def run(seed, tuned):
    return elm(seed, {arm: tuned[arm]["rate"] for arm in ARMS}, STEPS).arms()

def identities() -> dict[str, bool]:
    torch.manual_seed(0)
    unit, x = ELM(6, memories=3, tau=(2., 50.)), neuron(2, 60)[0][..., :6]
    with torch.no_grad():
        W, s, m, y = (torch.cat([unit.from_synapses.weight, unit.from_memories.weight], 1),
                      torch.zeros(2, 6), torch.zeros(2, 3), [])
        for t in range(60): # the authors' code, step by step
            s = unit.kappa_s*s + unit.w_s.relu()*x[:, t]
            h = torch.relu(torch.cat([s, unit.kappa_m*m], -1)@W.T + unit.from_synapses.bias)
            m = unit.kappa_m*m + unit.lam*(1 - unit.kappa_m)*1.7159*torch.tanh(2/3*unit.propose(h))
            y.append(unit.out(m))
        same = torch.allclose(unit(x), torch.cat(y, 1), atol=1e-5)
        early, late = x.clone(), x.clone()
        late[:, 40:] = 0
        causal = torch.equal(unit(early)[:, :40], unit(late)[:, :40])
    sizes = [sum(p.numel() for p in make().parameters()) for make in ARMS.values()]
    return {'computed at once it is the step-by-step neuron': same,
            'nothing is known before it happens': causal,
            'time constants are spread evenly in the logarithm': torch.allclose(
                -1/unit.kappa_m.log(), torch.tensor([2., math.sqrt(100.), 50.]), rtol=1e-4),
            'the arms are equally large to 2%': max(sizes) <= 1.02*min(sizes)}
