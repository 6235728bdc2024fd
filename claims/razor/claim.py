"""RL's Razor: the paper's toy (parity of digits) with its five ways to learn, the distances that
may explain forgetting, and three of the ways on text"""
from functools import lru_cache
import copy
import random
import torch
import torch.nn.functional as F
from torch import nn
import ftlab
from ftlab.core.data import Data
from ftlab.core.generate import generate
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.lab.digits import digits, pictures
from ftlab.trainers.callbacks import Every
from ftlab.trainers.objective import kl
from ftlab.trainers.rl.grpo import advantages, centered, grpo
from ftlab.trainers.rl.razor import (answer_kl, explained, other_order, own_answers, questions,
                                     weight_distance)

ARMS = ('grpo', 'grpo_kl', 'sft_1', 'sft_2', 'oracle')
# of the sweep for the law; the paper's go from 3e-6 to 1e-3
RATES = (1e-5, 2.15e-5, 4.64e-5, 1e-4, 2.15e-4, 4.64e-4, 1e-3)
OTHERS = ('reverse_kl', 'tv', 'l2', 'weights_l1', 'spectral', 'fisher', 'activations_l1',
          'activations_l2')
# what explains forgetting: the largest R squared of these, chosen anew in each seed
LAWS = dict(by_kl=('kl',), by_reverse_kl=('reverse_kl',), by_best_other=OTHERS,
            by_best_shift=OTHERS[3:], by_dose=('dose', 'gain'))
GROUP, BATCH, FEW = 64, 64, 60

def noisy(x, n, draw):
    "`n` pictures drawn from `x`, with noise, since there are 1,797 only; and which ones"
    i = torch.randint(len(x), (n,), generator=draw)
    return x[i] + .5*torch.randn((n, *x.shape[1:]), generator=draw), i

@lru_cache(4)
def toy(seed, split):
    """The network pretrained on both tasks, pictures to learn parity from, and held-out ones of
    both tasks. The old task: read digits whose pixels are shuffled. The last input says which."""
    rows, draw = digits(), torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(64, generator=draw)

    def parity(part, n):
        x, y = pictures(part)
        x, i = noisy(x.flatten(1), n, draw)
        return torch.cat([x, torch.ones(n, 1)], 1), y[i] % 2

    def old_task(part, n):
        x, y = pictures(part)
        x, i = noisy(x.flatten(1)[:, shuffle], n, draw)
        return torch.cat([x, -torch.ones(n, 1)], 1), y[i]

    few = random.Random(seed).sample(rows.train, FEW)
    (x, odd), (z, y) = parity(few, 500), old_task(rows.train, 500)
    labels = torch.cat([2*torch.randint(5, odd.shape, generator=draw) + odd, y])
    x = torch.cat([x, z])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(65, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
                            nn.Linear(256, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(200):
        i = torch.randint(len(x), (128,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), labels[i]).backward()
        optimizer.step()
    held_out = getattr(rows, split)
    return net, parity(rows.train, 8000), parity(held_out, 2000), old_task(held_out, 2000)

def annotate(arm, net, x, odd, draw):
    "One right label for each picture, as the arm's annotator gives it"
    if arm == 'sft_1':
        return odd
    if arm == 'sft_2':
        return odd + 4*torch.randint(2, odd.shape, generator=draw)
    right = torch.arange(10)[None] % 2 == odd[:, None]
    # the KL-minimal distribution that is always right is the base's, renormalised
    with torch.no_grad():
        return torch.multinomial(net(x).softmax(1)*right, 1, generator=draw)[:, 0]

def reinforced(arm, net, base, x, odd, draw):
    logp = net(x).log_softmax(1)
    said = torch.multinomial(logp.detach().exp(), GROUP, replacement=True, generator=draw)
    weight = advantages((said % 2 == odd[:, None]).float())
    loss = -(weight*logp.gather(1, said)).mean()
    if arm == 'grpo_kl':
        with torch.no_grad():
            to = base(x).log_softmax(1)
        loss = loss + .1*(logp.exp()*(logp - to)).sum(1).mean()
    return loss

@lru_cache(64)
def learned(arm, rate, seed, split, steps):
    "Copies of the network after an eighth, a quarter, half and all of the steps"
    base, (x, odd), *_ = toy(seed, split)
    net, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    labels = None if arm.startswith('grpo') else annotate(arm, base, x, odd, draw)
    optimizer, copies = torch.optim.Adam(net.parameters(), rate), {}
    for step in range(1, steps + 1):
        i = torch.randint(len(x), (BATCH,), generator=draw)
        loss = (F.cross_entropy(net(x[i]), labels[i]) if labels is not None
                else reinforced(arm, net, base, x[i], odd[i], draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in {round(steps*s) for s in (1/8, 1/4, 1/2, 1)}:
            copies[step] = copy.deepcopy(net)
    return copies

@torch.no_grad()
def scores(net, seed, split):
    _, _, (x, odd), (z, y) = toy(seed, split)
    return (net(x).argmax(1) % 2 == odd).float(), (net(z).argmax(1) == y).float()

def toy_path(arm, rate, seed, split, steps):
    base = toy(seed, split)[0]
    new, old = scores(base, seed, split)
    path = []
    for step, net in [(0, base), *learned(arm, rate, seed, split, steps).items()]:
        now, kept = scores(net, seed, split)
        path.append(dict(step=step, gain=float((now - new).mean()), score=float(now.mean()),
                         forgetting=float((old - kept).mean()),
                         items=dict(gain=now.tolist(), forgetting=kept.tolist())))
    return path

# ---------- how far a network has moved, measured in nine ways
@lru_cache(2)
@torch.enable_grad()
def fisher(seed, split):
    "The diagonal of the Fisher matrix on 200 pictures of the old task, labels drawn from the base"
    net, *_, (z, _) = toy(seed, split)
    total = [torch.zeros_like(p) for p in net.parameters()]
    said = torch.multinomial(net(z[:200]).softmax(1), 1,
                             generator=torch.Generator().manual_seed(seed))[:, 0]
    for x, y in zip(z[:200], said):
        grads = torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), list(net.parameters()))
        total = [t + g.square()/200 for t, g in zip(total, grads)]
    return total

@torch.no_grad()
def distances(net, seed, split):
    base, _, (x, _), _ = toy(seed, split)
    p, q = base(x).softmax(1), net(x).softmax(1)
    moved = [b - a for a, b in zip(base.parameters(), net.parameters())]
    hidden = net[:4](x) - base[:4](x)
    weighted = sum((f*m.square()).sum() for f, m in zip(fisher(seed, split), moved))
    found = dict(kl=kl(base(x), net(x)).mean(), reverse_kl=kl(net(x), base(x)).mean(),
                 tv=.5*(p - q).abs().sum(1).mean(), l2=(p - q).norm(dim=1).mean(),
                 weights_l1=sum(m.abs().sum() for m in moved),
                 spectral=sum(torch.linalg.matrix_norm(m, 2) for m in moved if m.ndim == 2),
                 fisher=weighted.sqrt(), activations_l1=hidden.abs().sum(1).mean(),
                 activations_l2=hidden.norm(dim=1).mean())
    return {k: float(v) for k, v in found.items()}

@lru_cache(2)
def sweep(seed, split, steps):
    "Every evaluation of every arm at every rate: forgetting, and how far the network has moved"
    points = []
    for arm in ARMS:
        for rate in RATES:
            copies = learned(arm, rate, seed, split, steps)
            path = toy_path(arm, rate, seed, split, steps)[1:]
            for at, net in zip(path, copies.values()):
                known = dict(forgetting=at['forgetting'], gain=at['gain'], dose=rate*at['step'])
                points.append(known | distances(net, seed, split))
    return points

# ---------- the same question on text
TEXT, LONGEST, QUESTIONS, DRAWS, EACH = 64, 8, 512, 16, 8
OLD = 'fact context add reverse sort max last dedupe count tavi review tool'.split()
ITEMS = dict(validation=(200, 50), test=(400, 100))

def outcomes(model, tok, seed, split):
    "Of the new task, of each old skill"
    new, old = ITEMS[split]
    rows = questions(new, split, seed)
    said = generate(model, tok, [r['prompt'] for r in rows], max_new_tokens=LONGEST)
    found = {'another order': [other_order(r, a) for r, a in zip(rows, said)]}
    for s in OLD:
        rows = WORLD.rows(s, old, split, seed)
        found[s] = [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]
    return found

@lru_cache(2)
def text_before(seed, split):
    "The base, its outcomes, and its own answers to held-out questions, on which the KL is measured"
    model, tok = ftlab.load('lab-s')
    asked = [r['prompt'] for r in questions(ITEMS[split][0], split, seed)]
    return model, outcomes(model, tok, seed, split), own_answers(model, tok, asked, LONGEST, seed)

@lru_cache(2)
def oracle_rows(seed):
    """Right answers drawn from the base's distribution, equally many for each question that it ever
    answers correctly; and how many questions it does not"""
    model, tok = ftlab.load('lab-s')
    asked = [r for r in questions(QUESTIONS, 'train', seed) for _ in range(DRAWS)]
    right = {}
    for r, s in zip(asked, own_answers(model, tok, [r['prompt'] for r in asked], LONGEST, seed)):
        if other_order(r, s['response']):
            right.setdefault(r['prompt'], []).append(dict(r, response=s['response']))
    draw = random.Random(seed)
    return [draw.choice(v) for v in right.values() for _ in range(EACH)], QUESTIONS - len(right)

def text(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s')
    rows, recipe, missing = questions(QUESTIONS, 'train', seed), Recipe(arm), 0
    if arm == 'grpo':
        recipe = grpo(8, beta=0., reward=other_order, advantage=centered)
    if arm == 'oracle':
        rows, missing = oracle_rows(seed)
    data = Data(train=rows, validation=rows[:2], test=rows[:2], kind='text', name='another order')
    (base, before, said), mean = text_before(seed, split), lambda x: sum(x)/len(x)

    def look(state):
        if state.step not in {round(steps*s) for s in (0, 1/8, 1/4, 1/2, 1)}:
            return {}
        now = outcomes(state.model, state.tok, seed, split)
        lost = {s: mean(before[s]) - mean(now[s]) for s in OLD}
        return dict(gain=mean(now['another order']) - mean(before['another order']),
                    forgetting=mean(list(lost.values())),
                    kl=answer_kl(base, state.model, tok, said),
                    moved=weight_distance(base, state.model),
                    items=dict(gain=now['another order'], forgetting={s: now[s] for s in OLD}))

    run = ftlab.fit(model, tok, data, recipe, steps=steps, batch_size=TEXT, lr=rate, seed=seed,
                    callbacks=(Every(1, look),), progress=False)
    path = [p for p in run.path if 'gain' in p]
    left_out = {'questions that the base never answers correctly': missing}
    return path[-1] | dict(path=path, excluded=left_out if arm == 'oracle' else {})

def run(arm, rate, seed, split, steps):
    if arm.startswith('text_'):
        return text(arm.removeprefix('text_'), rate, seed, split, steps//8)
    if arm in LAWS:
        points = sweep(seed, split, steps)
        r2 = {k: explained(points, k) for k in ('kl', *OTHERS, 'dose', 'gain')}
        return r2 | dict(r2=max(r2[k] for k in LAWS[arm]))
    path = toy_path(arm, rate, seed, split, steps)
    return path[-1] | dict(path=path)

def identities():
    net, *_ = toy(0, 'validation')
    x = torch.randn(50, 65, generator=torch.Generator().manual_seed(0))
    p, odd = net(x).detach().softmax(1), torch.arange(50) % 2
    drawn = annotate('oracle', net, x, odd, torch.Generator().manual_seed(0))
    right = torch.arange(10)[None] % 2 == odd[:, None]
    oracle = p*right/(p*right).sum(1, keepdim=True)
    other = .9*oracle + .1*right/5
    far = lambda q: float((p*right*(oracle.clamp(min=1e-9)/q.clamp(min=1e-9)).log()).sum())
    same = distances(net, 0, 'validation')
    curve = [dict(forgetting=3*x**2 - x, kl=x, moved=1.) for x in (.1, .4, .5, .9)]
    return {'a mixture of the oracle and equal right answers is farther from the base than the oracle':
            far(other) > 0,
            'the oracle draws right labels only': bool((drawn % 2 == odd).all()),
            'a network is at no distance from itself': max(map(abs, same.values())) < 1e-6,
            'a quadratic is explained wholly, a constant explains nothing': abs(
                explained(curve, 'kl') - 1) < 1e-9 and abs(explained(curve, 'moved')) < 1e-9}
