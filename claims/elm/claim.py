"""An ELM neuron beside an LSTM of its size, itself without slow memories, and a linear filter, on a
synthetic neuron"""
import math
import torch
from torch import nn
from ftlab.beyond.brain.elm import ARMS, ELM, LSTM, imitate, neuron, score

class Linear(nn.Module):
    "Twenty leaky traces of each synapse, time constants as the ELM neuron's, and one layer on them"

    def __init__(self, synapses=48, time=150):
        super().__init__()
        kappa = torch.exp(-1/torch.logspace(0, math.log10(150), 20))
        age = torch.arange(time)[:, None] - torch.arange(time)
        kernel = torch.where(age >= 0, kappa[:, None, None]**age.clamp(min=0), 0.)
        self.register_buffer('kernel', kernel*(1 - kappa**2).sqrt()[:, None, None])
        self.out = nn.Linear(20*synapses, 1)

    def traces(self, x):
        return torch.einsum('kts,bsn->btkn', self.kernel, x).flatten(2)

    def forward(self, x): # self.out(self.traces(x)), but the synapses are summed first: an eighth of the time
        summed = x@self.out.weight.view(20, -1).T
        return torch.einsum('kts,bsk->bt', self.kernel, summed) + self.out.bias

class Traced(LSTM):
    "The LSTM, which reads the ELM neuron's traces of the spikes in place of the spikes"

    def __init__(self, synapses=48, tau_s=5.):
        super().__init__(synapses)
        self.w_s, self.kappa_s = nn.Parameter(torch.full((synapses,), .5)), math.exp(-1/tau_s)

    traces = ELM.traces

    def forward(self, x):
        return super().forward(self.traces(x))

# what is trained, its rate, how many times the steps
FIXED = dict(lstm_twice=('lstm', 3.16e-2, 2), lstm_traces=(Traced, 3.16e-2, 1))

def run(arm, rate, seed, split, steps) -> dict:
    most = score(None, seed, split)
    if arm == 'neuron':
        return dict(auc=most, missed=0.)
    make, rate, times = FIXED.get(arm, (Linear if arm == 'linear' else arm, rate, 1))
    found = score(imitate(make, rate, seed, times*steps), seed, split)
    return dict(auc=found, missed=(most - found)/(most - .5))

def identities() -> dict[str, bool]:
    torch.manual_seed(0)
    filtered, some = Linear(), neuron(2, 150)[0]
    unit, x = ELM(6, memories=3, tau=(2., 50.)), neuron(2, 60)[0][..., :6]
    with torch.no_grad():
        W = torch.cat([unit.from_synapses.weight, unit.from_memories.weight], 1)
        s, m, y = torch.zeros(2, 6), torch.zeros(2, 3), []
        for t in range(60): # the authors' code, step by step
            s = unit.kappa_s*s + unit.w_s.relu()*x[:, t]
            h = torch.relu(torch.cat([s, unit.kappa_m*m], -1)@W.T + unit.from_synapses.bias)
            m = unit.kappa_m*m + unit.lam*(1 - unit.kappa_m)*1.7159*torch.tanh(2/3*unit.propose(h))
            y.append(unit.out(m))
        same = torch.allclose(unit(x), torch.cat(y, 1), atol=1e-5)
        early, late = x.clone(), x.clone()
        late[:, 40:] = 0
        causal = torch.equal(unit(early)[:, :40], unit(late)[:, :40])
    sizes = [sum(p.numel() for p in make().parameters()) for make in (*ARMS.values(), Traced)]
    return {'computed at once it is the step-by-step neuron': same,
            'nothing is known before it happens': causal,
            'the linear filter is one layer on its traces': torch.allclose(
                filtered(some), filtered.out(filtered.traces(some)).squeeze(-1), atol=1e-5),
            'time constants are spread evenly in the logarithm': torch.allclose(
                -1/unit.kappa_m.log(), torch.tensor([2., math.sqrt(100.), 50.]), rtol=1e-4),
            'the arms are equally large to 2%': max(sizes) <= 1.02*min(sizes)}
