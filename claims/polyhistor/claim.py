"""A small hierarchical vision transformer, trained to read one digit, is frozen; adapters and decoders learn
four dense tasks on canvases with two digits in noise"""
import random
from functools import lru_cache, partial
import torch
from torch import nn
from torch.nn import functional as F
from types import SimpleNamespace
from ftlab.adapters.modules.polyhistor import (KEY, Adapter, asking, parameters, polyhistor,
                                               task_adapters)
from ftlab.core.data import Data
from ftlab.core.model import evaluating
from ftlab.core.recipe import Recipe
from ftlab.lab.digits import digits
from ftlab.trainers.fit import fit

SIDE, PATCH = 16, 2          # pixels of a canvas and of a patch; 8 x 8 patches
WIDTHS, BLOCKS = (32, 64), 2 # of the two stages; the second has a quarter of the tokens
TASKS = ('class', 'foreground', 'distance', 'inversion')
OUTPUTS = (11, 1, 1, 1)      # of each task's decoder, at each patch; the last class is "no ink"
IMAGES = dict(train=256, validation=100, test=250)
PRETRAINING = dict(steps=600, lr=5e-3, noise=.2) # of 32 canvases each
NOISE, INK = .3, .15         # noise on every pixel; a patch with more mean brightness has ink

class Block(nn.Module):
    "Attention and MLP with norms before them"
    def __init__(self, d, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3*d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2*d), nn.Linear(2*d, d)

    def forward(self, h):
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))

class Seer(nn.Module):
    "Two stages; between them four neighbouring tokens become one of twice the width"
    def __init__(self):
        super().__init__()
        a, b = WIDTHS
        n = SIDE//PATCH
        self.patches = nn.Linear(PATCH**2, a)
        self.places = nn.Parameter(.02*torch.randn(n*n, a))
        self.first = nn.ModuleList(Block(a) for _ in range(BLOCKS))
        self.merge = nn.Linear(4*a, b)
        self.second = nn.ModuleList(Block(b) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(b)
        self.read = nn.Linear(b, 11)
        self.decoders = nn.ModuleList(nn.Linear(b, 4*k) for k in OUTPUTS)

    def states(self, x): # [rows, 1, side, side]; [rows, 16 tokens of the second stage, b]
        h = self.patches(F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)) + self.places
        for block in self.first:
            h = block(h)
        n = SIDE//PATCH
        g = self.merge(F.unfold(h.mT.unflatten(2, (n, n)), 2, stride=2).mT)
        for block in self.second:
            g = block(g)
        return self.norm(g)

    def forward(self, pixel_values): # [rows, 64 patches, outputs of all decoders]
        g, n = self.states(pixel_values), SIDE//PATCH//2
        maps = [F.pixel_shuffle(d(g).mT.unflatten(2, (n, n)), 2) for d in self.decoders]
        return SimpleNamespace(logits=torch.cat(maps, 1).flatten(2).mT)

@lru_cache(1)
def known() -> dict:
    "The pictures of digits in 0..1 and their names, by split"
    found = digits()
    return {s: [((r['pixel_values'][0] + 1)/2, r['labels']) for r in getattr(found, s)]
            for s in ('train', 'validation', 'test')}

def canvas(rng, of, many):
    "A clean canvas and the class of each pixel; the digits stand in different halves"
    x, y = torch.zeros(SIDE, SIDE), torch.full((SIDE, SIDE), 10)
    tops = rng.sample((0, 8), many) if many > 1 else [rng.choice((0, 4, 8))]
    for top in tops:
        picture, name = rng.choice(of)
        left = rng.choice((0, 4, 8))
        x[top:top + 8, left:left + 8] = picture
        y[top:top + 8, left:left + 8] = name
    return x, y

def noisy(x, rng, noise=NOISE):
    draw = torch.Generator().manual_seed(rng.randrange(2**40))
    return (x + noise*torch.randn(x.shape, generator=draw))[None]*2 - 1

def dense(x, y) -> list:
    "What each task asks at each patch, as [64] numbers; `x` is light on dark"
    light = F.avg_pool2d(x[None, None], PATCH)[0, 0]
    ink = light > INK
    where, all_of = ink.nonzero().float(), torch.ones_like(ink).nonzero().float()
    far = torch.cdist(all_of, where).min(1).values/4
    name = torch.where(ink, y[::PATCH, ::PATCH], 10)
    return [name.flatten().float(), ink.flatten().float(), far, light.flatten()] # seen is the negative

@lru_cache(4)
def scenes(split, seed) -> list:
    "Canvases with two digits: what is seen, and what each task asks"
    rng = random.Random(f'canvas/{split}/{seed}')
    out = []
    for _ in range(IMAGES[split]):
        x, y = canvas(rng, known()[split], 2)
        out.append((noisy(1 - x, rng), dense(x, y))) # dark ink on light paper
    return out

def losses(logits, target, task): # [rows, 64, 14], [rows, 64], [rows]; [rows]
    "The loss of each row in its own task: cross-entropy, twice; squared error, twice"
    found = []
    for t, (out, want) in zip(task.tolist(), zip(logits, target)):
        own = out.split(OUTPUTS, -1)[t]
        if t == 0:
            on = want < 10
            found.append(F.cross_entropy(own[on], want[on].long()))
        elif t == 1:
            found.append(F.binary_cross_entropy_with_logits(own[:, 0], want))
        else:
            found.append(8*F.mse_loss(own[:, 0], want))
    return torch.stack(found)

def joint(state):
    "The sum of the tasks' losses, as a mean over rows"
    b = state.batch
    logits = state.model(b['pixel_values']).logits
    return losses(logits, b['target'], b['task']).sum()/sum(len(m['task']) for m in state.batches)

def named(y):
    "The class of each token of the second stage: of the digit whose square holds its middle"
    return y[1::2*PATCH, 1::2*PATCH].flatten()

@lru_cache(1)
def pretrained() -> dict:
    "Weights of a model that learned to name a digit on a noisy canvas, at every token of the second stage"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, rng, of = Seer(), random.Random('pretraining'), known()['train']
        opt = torch.optim.AdamW(model.parameters(), lr=PRETRAINING['lr'], weight_decay=.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(opt, PRETRAINING['lr'], PRETRAINING['steps'])
        for _ in range(PRETRAINING['steps']):
            made = [canvas(rng, of, 1) for _ in range(32)]
            x = torch.stack([noisy(c, rng, PRETRAINING['noise']) for c, _ in made])
            names = torch.stack([named(y) for _, y in made])
            said = model.read(model.states(x))
            loss = F.cross_entropy(said.flatten(0, 1), names.flatten())
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()
    return model.state_dict()

def fresh(seed):
    "The pretrained model with new decoders"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Seer()
    new = {n: p for n, p in model.state_dict().items() if n.startswith('decoders')}
    model.load_state_dict(pretrained() | new)
    return model.eval()

STANDS = dict(targets=r'\.(o|down)\.weight$', decoders='^decoders')
SITES = [w for w in WIDTHS for _ in range(2*BLOCKS)] # widths of the layers with an adapter
SIZES = dict(polyhistor=dict(form='kron', down=4, rank=8, kernel=1, embedding=8),
             separate=dict(form='separate', down=4), shared=dict(form='shared', down=8),
             small=dict(form='separate', down=32),
             tables=dict(form='tables', down=4, rank=8, kernel=1))

def only_decoders(model, batches=None, seed=0):
    return {n: True for n, _ in model.named_parameters() if n.startswith('decoders')}

def recipe_of(arm):
    if arm == 'decoders':
        return Recipe(arm, select=only_decoders, objective=joint)
    size = dict(SIZES[arm])
    form = size.pop('form')
    made = polyhistor if form == 'kron' else partial(task_adapters, form)
    return made(TASKS, **size, **STANDS)*Recipe(objective=joint)

def tuned(arm, rate, seed, steps):
    rows = [dict(pixel_values=x, target=asks[t], task=t)
            for x, asks in scenes('train', seed) for t in range(len(TASKS))]
    return fit(fresh(seed), None, Data(rows, [], [], 'image'), recipe_of(arm), steps=steps, lr=rate,
               batch_size=32, schedule='cosine', warmup=steps//10, weight_decay=0., seed=seed,
               progress=False)

def unexplained(t, said, want): # [pictures, 64, outputs], [pictures, 64]; error and that of a constant
    "Each picture's error, and the mean error of the best answer that ignores the picture"
    if t == 0:
        on = want < 10
        wrong = (said[..., :10].argmax(-1) != want).float()*on
        most = want[on].mode().values
        return wrong.sum(1)/on.sum(1), float((want[on] != most).float().mean())
    guess = said[..., 0].sigmoid() if t == 1 else said[..., 0]
    return (guess - want).square().mean(1), float(want.var(correction=0))

@torch.no_grad()
def scored(model, asked) -> dict:
    "Each task's score of each picture: 1 is perfect, 0 what an answer gets that ignores the picture"
    x, out = torch.stack([x for x, _ in asked]), {}
    several = any(isinstance(m, Adapter) for m in model.modules())
    for t, name in enumerate(TASKS):
        want = torch.stack([asks[t] for _, asks in asked])
        with evaluating(model):
            if several:
                with asking(model, name):
                    logits = model(x).logits
            else:
                logits = model(x).logits
        error, constant = unexplained(t, logits.split(OUTPUTS, -1)[t], want)
        out[name] = (1 - error/constant).tolist()
    return out

def run(arm, rate, seed, split, steps):
    found = scored(tuned(arm, rate, seed, steps).model, scenes(split, seed))
    each = {n: sum(s)/len(s) for n, s in found.items()}
    return dict(each, score=sum(each.values())/len(each), questions=len(TASKS)*IMAGES[split],
                items=dict(score=[s for own in found.values() for s in own]))

def derive(found):
    "The better of the two baselines with as many parameters, seed by seed"
    two = [found[a] for a in ('shared', 'small') if a in found]
    best = lambda k: max(f[k] for f in two)
    return dict(same_size={k: best(k) for k in ('score', *TASKS)}) if len(two) == 2 else {}

def identities():
    n = {a: parameters(SITES, len(TASKS), **s) for a, s in SIZES.items()}
    run = tuned('polyhistor', 1e-3, 0, 1)
    on = [d for d in run.delta.attached.deltas.values() if isinstance(d, Adapter)]
    counted = sum(p.numel() for d in on for p in d.parameters())
    base = fresh(0)
    x = torch.stack([x for x, _ in scenes('train', 0)[:4]])
    seen = (F.avg_pool2d(x, PATCH).flatten() + 1)/2
    asked = torch.cat([asks[3] for _, asks in scenes('train', 0)[:4]])
    with run.disabled(), torch.no_grad():
        off = torch.equal(run.model.states(x), base.states(x))
    return {'at most a quarter of the parameters of separate adapters': 4*n['polyhistor'] <= n['separate'],
            'the two small baselines have as many, within 2 in 100':
            all(abs(n[a]/n['polyhistor'] - 1) < .02 for a in ('shared', 'small')),
            'inversion asks for the negative of what is seen':
                abs(float((seen + asked).mean()) - 1) < .05,
            'as many train as the formula says': counted == n['polyhistor'],
            'switched off, the states are those of the base': off}
