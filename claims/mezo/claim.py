"MeZO beside the untouched model, a linear probe and backpropagation with 32 times fewer steps"
from types import SimpleNamespace
import torch
import torch.nn.functional as F
import ftlab
from ftlab.core.batches import collate
from ftlab.core.model import model_inputs
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.tokens import encode_all
from ftlab.native import perturb_
from ftlab.trainers.optimizers.mezo import MeZO, seed_of

REVISION, SKILL, EXAMPLES = 'step-250', 'refuse', 128
RATIO = 32 # steps of MeZO for one of backpropagation: 20,000 and 625 in the paper
ROWS = dict(mezo=16, full=8) # in a step, as in the paper
ITEMS = dict(test=400, validation=300)
LONGER = dict(mezo_1440=('mezo', 1e-4), probe_1440=('probe', 3.16e-3)) # three times the steps

def probe(model, tok, rows, rate, seed, steps):
    "Train the output layer alone, on hidden states that are computed once: no layer is passed back"
    b = collate(encode_all(rows, tok, 'text', 100), tok.pad_token_id)
    on = b['labels'][:, 1:] != -100
    with torch.no_grad():
        h = model.model(**model_inputs(b)).last_hidden_state[:, :-1]
    head = torch.nn.Linear(h.shape[-1], len(tok), bias=False)
    head.weight.data.copy_(model.lm_head.weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = rate*(1 - step/steps)
        some = torch.randperm(len(rows), generator=rng)[:ROWS['mezo']]
        optimizer.zero_grad()
        F.cross_entropy(head(h[some][on[some]]), b['labels'][some, 1:][on[some]]).backward()
        optimizer.step()
    model.lm_head = head

def run(arm, rate, seed, split, steps):
    if arm in LONGER:
        arm, rate, steps = *LONGER[arm], 3*steps
    model, tok = ftlab.load('lab-s', revision=REVISION)
    data = ftlab.data(SKILL, n=EXAMPLES, seed=seed)
    if arm == 'probe':
        probe(model, tok, data.train, rate, seed, steps)
    elif arm != 'base':
        ftlab.fit(model, tok, data, ftlab.methods.get(arm), lr=rate, seed=seed, progress=False,
                  steps=steps if arm == 'mezo' else steps//RATIO, batch_size=ROWS[arm])
    rows = WORLD.rows(SKILL, ITEMS[split], split, seed)
    right = [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]
    return dict(score=sum(right)/len(right), items=dict(score=right))

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s', revision=REVISION)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = {}
    class Look:
        def after_step(self, state):
            seen.update(moves=state.extra['moves'],
                        grads=[p for p in state.model.parameters() if p.grad is not None])
    ftlab.fit(model, tok, ftlab.data(SKILL, n=64), ftlab.methods.mezo(), steps=5, batch_size=16,
              lr=1e-4, callbacks=(Look(),), progress=False)
    params = dict(model.named_parameters())
    again = {n: p.clone() for n, p in start.items()}
    MeZO(again, SimpleNamespace(lr=1e-4, weight_decay=0., factor=None)).replay(seen['moves'])
    w = {'w': torch.tensor([1., -2., .5, 3.])}
    A = torch.tensor([1., 2., 3., 4.])
    step = MeZO(w, SimpleNamespace(lr=0., weight_decay=0., factor=lambda s: 1.))
    state, estimates = SimpleNamespace(seed=0, step=0, extra={}, model=torch.nn.Identity()), []
    for state.step in range(4000):
        step(state, [lambda: (A*w['w']**2).sum()/2])
        z = torch.zeros(4)
        perturb_([z], seed_of(0, state.step), 1.)
        estimates.append(step.log[-1][1]*z)
    e = torch.stack(estimates)
    off = (e.mean(0) - A*torch.tensor([1., -2., .5, 3.])).abs()
    return {
        'the learning rate is the same at every step': len({lr for *_, lr in seen['moves']}) == 1,
        'the log of seeds and numbers gives the weights again, bit for bit': all(
            torch.equal(again[n], p) for n, p in params.items())
        and any((params[n] != start[n]).any() for n in start),
        'no gradient is ever there': not seen['grads'],
        'on a quadratic the estimate is right on average': bool((off < 4*e.std(0)/4000**.5).all())}
