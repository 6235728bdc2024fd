"""A small spectrogram transformer that knows tones, chirps and noises learns two tasks of sounds made of
two of them: by adapters, LoRA, biases or deep prompts, with few and with three times as many parameters."""
import hashlib
from functools import lru_cache, partial
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from ftlab.adapters.attach import attach
from ftlab.core.loading import fresh_head, head_names
from ftlab.instruments.runs import runs_folder
from ftlab.methods import bitfit, lora, petl_ast

RATE, WINDOW, HOP, FRAMES, BANDS = 8000, 256, 64, 32, 32 # of the sound in Hz; of the spectrogram in samples
LENGTH = WINDOW + HOP*(FRAMES - 1)  # 2,240 samples, .28 seconds
TIME = np.arange(LENGTH)/RATE
ROWS = dict(train=640, validation=200, test=500) # of each task
PATCH = 8
PATCHES = (BANDS//PATCH)*(FRAMES//PATCH) # tokens of a sound
BATCH = 16
PRETRAIN = dict(sounds=12000, steps=900, batch=64, lr=2e-3)

# ---------- sounds

def pitch(rng, low=200., high=1600.):
    return low*(high/low)**rng.random()

def tone(rng, f):
    return np.sin(2*np.pi*(f*TIME + rng.random()))

def chirp(rng, f, up):
    "A tone whose pitch rises or falls by about an octave"
    ratio = (1.6 + rng.random())**(1 if up else -1)
    return np.sin(2*np.pi*(f*LENGTH/RATE/np.log(ratio)*(ratio**(TIME/TIME[-1]) - 1) + rng.random()))

def noise(rng, low=0., high=4000.):
    spectrum = np.fft.rfft(rng.normal(size=LENGTH))
    at = np.fft.rfftfreq(LENGTH, 1/RATE)
    return np.fft.irfft(spectrum*((at >= low) & (at <= high)), LENGTH)*np.sqrt(4000/(high - low))*.7

def harmonics(rng, f, step):
    return sum(tone(rng, f*k)/k for k in range(1, 8, step) if f*k < RATE/2)

def trembling(rng, f, slow):
    beat = (8 + 6*rng.random())*(1 if slow else 3)
    return tone(rng, f)*(.5 + .5*np.sin(2*np.pi*(beat*TIME + rng.random())))

KNOWN = [lambda r: tone(r, pitch(r)), lambda r: chirp(r, pitch(r), True),
         lambda r: chirp(r, pitch(r, 400., 3000.), False), noise, lambda r: noise(r, 0., 900.),
         lambda r: noise(r, 1800., 4000.), lambda r: harmonics(r, pitch(r, 150., 700.), 1),
         lambda r: harmonics(r, pitch(r, 150., 700.), 2), lambda r: trembling(r, pitch(r), True),
         lambda r: trembling(r, pitch(r), False)]

def window(start, end, edge=80):
    "1 from `start` to `end` (in samples), with soft edges"
    at = np.arange(LENGTH)
    return np.clip((at - start)/edge, 0, 1)*np.clip((end - at)/edge, 0, 1)

def in_turn(rng, first, second):
    "One sound, then another, with a gap between them whose place varies"
    gap, cut = 60 + 160*rng.random(), LENGTH*(.4 + .2*rng.random())
    return first*window(0, cut - gap/2) + second*window(cut + gap/2, LENGTH)

# the new sounds: (rng, class) -> samples, and how many classes there are
def order(rng, c):
    "Which two of three known sounds follow each other, and in what order"
    one = [lambda: tone(rng, pitch(rng)), lambda: noise(rng), lambda: chirp(rng, pitch(rng), True)]
    i, j = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)][c]
    return in_turn(rng, one[i](), one[j]())

def interval(rng, c):
    "By how much the second tone is above or below the first"
    f = pitch(rng, 500., 1100.)
    return in_turn(rng, tone(rng, f), tone(rng, f*2**((-12, -6, -3, 3, 6, 12)[c]/12)))

TASKS = dict(order=(order, 6), interval=(interval, 6))

# ---------- spectrograms

@lru_cache(1)
def mel_bands():
    "Triangles on the mel scale, [bands, frequencies]"
    mel = lambda f: 2595*np.log10(1 + f/700)
    edges = 700*(10**(np.linspace(mel(60.), mel(4000.), BANDS + 2)/2595) - 1)
    at = np.fft.rfftfreq(WINDOW, 1/RATE)
    left, mid, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((at - left)/(mid - left), (right - at)/(right - mid)), 0, None)

def spectrograms(sounds):
    "Log-mel spectrograms of sounds [n, samples], as float32 [n, 1, bands, frames], about -1 to 1"
    frames = np.lib.stride_tricks.sliding_window_view(sounds, WINDOW, 1)[:, ::HOP]
    power = np.abs(np.fft.rfft(frames*np.hanning(WINDOW)))**2
    x = np.log(power @ mel_bands().T + 1e-2)
    return torch.tensor((x.transpose(0, 2, 1)/6)[:, None], dtype=torch.float32)

def heard(rng, make, n, classes):
    "Draw n sounds, each class as often as the others, at any level and in some noise"
    y = rng.permutation(np.arange(n) % classes)
    level, hiss = (lambda: .3 + .7*rng.random()), (lambda: .01 + .1*rng.random())
    x = np.stack([make(rng, c)*level() + hiss()*rng.normal(size=LENGTH) for c in y])
    return spectrograms(x), torch.tensor(y)

@lru_cache(16)
def sounds(task, split, seed):
    make, classes = TASKS[task]
    rng = np.random.default_rng([seed, sorted(ROWS).index(split), sorted(TASKS).index(task)])
    return heard(rng, make, ROWS[split], classes)

# ---------- the base

def empty(classes):
    return ViTForImageClassification(ViTConfig(
        image_size=BANDS, patch_size=PATCH, num_channels=1, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=192, hidden_dropout_prob=0.,
        attention_probs_dropout_prob=0., num_labels=classes)).eval()

def answers(model, x):
    """Logits [rows, classes], from the mean over the first token and those of the sound: all there are, but for
    prompts, which would be two thirds of the mean here and are a few of hundreds in AST"""
    h = model.vit(x).last_hidden_state
    return model.classifier(torch.cat([h[:, :1], h[:, -PATCHES:]], 1).mean(1))

def trained(model, params, x, y, steps, batch, lr, seed, look=list):
    "Train by AdamW at a rate that falls to zero; return what `look()` says after half of the steps"
    opt, g = torch.optim.AdamW(params, lr=lr, weight_decay=0.), torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step*batch % len(x) + batch > len(x) or not step:
            turn = torch.randperm(len(x), generator=g)
        rows = turn[step*batch % (len(x) - batch + 1):][:batch]
        opt.param_groups[0]['lr'] = lr*(1 - step/steps)
        loss = nn.functional.cross_entropy(answers(model, x[rows]), y[rows])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.)
        opt.step()
        if step + 1 == steps//2:
            seen = look()
    return seen

@lru_cache(1)
def base():
    "The pretrained weights: made once, in about half a minute, and kept with the runs"
    print_of = hashlib.blake2s(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()
    file = runs_folder()/'petl_ast'/f'{print_of[:16]}.safetensors'
    if not file.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = empty(len(KNOWN))
        rng = np.random.default_rng(0)
        x, y = heard(rng, lambda r, c: KNOWN[c](r), PRETRAIN['sounds'], len(KNOWN))
        p = PRETRAIN
        trained(model, list(model.parameters()), x, y, p['steps'], p['batch'], p['lr'], 0)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix('.part')
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, part)
        part.rename(file)
    return load_file(file)

def prepared(classes, seed):
    "The base with a fresh classifier"
    model = empty(classes)
    head = head_names(model)
    model.load_state_dict({n: t for n, t in base().items() if n not in head}, strict=False)
    return fresh_head(model, seed)

# ---------- arms

class Prompts(nn.Module):
    """Deep prompts (Jia et al. 2022), as in the official src/AST_prompt_tuning.py: trained vectors after the
    first token, others before each block"""

    def __init__(self, model, tokens):
        super().__init__()
        size = model.config.hidden_size
        bound = (6/(3*PATCH*PATCH + size))**.5
        self.p = nn.Parameter((2*torch.rand(len(model.vit.layers), tokens, size) - 1)*bound)
        for i, layer in enumerate(model.vit.layers):
            layer.register_forward_pre_hook(lambda m, args, i=i: (self.put(i, args[0]), *args[1:]))

    def put(self, i, h):
        rest = h[:, 1:] if not i else h[:, 1 + self.p.shape[1]:]
        return torch.cat([h[:, :1], self.p[i].expand(len(h), -1, -1), rest], 1)

QV = r'\.(q|v)_proj\.weight$'
ARMS = dict(adapter=petl_ast(size=4), adapter_large=petl_ast(size=15), lora=lora(r=3, targets=QV),
            lora_large=lora(r=9, targets=QV), bitfit=bitfit(), prompt=11, prompt_large=33, probe=0)

def put_on(model, arm):
    "Attach an arm; return what trains. The classifier and the last norm train in each"
    own = head_names(model) + [n for n, _ in model.named_parameters() if n.startswith('vit.layernorm')]
    made = ARMS[arm]
    if isinstance(made, int):
        model.requires_grad_(False)
        train = [model.get_parameter(n).requires_grad_(True) for n in own]
        return train + (list(Prompts(model, made).parameters()) if made else [])
    chosen = {n: m for n, m in made.select(model).items() if n not in own}
    att = attach(model, chosen, made.delta, also=tuple(own))
    return list(att.parameters().values())

def size(arm):
    "What an arm trains besides the classifier"
    model = prepared(6, 0)
    head = sum(model.get_parameter(n).numel() for n in head_names(model))
    return sum(p.numel() for p in put_on(model, arm)) - head

@torch.no_grad()
def hits(model, x, y):
    return (answers(model, x).argmax(-1) == y).int().tolist()

def run(arm, rate, seed, split, steps):
    own, halfway = {}, []
    for i, (task, (_, classes)) in enumerate(TASKS.items()):
        with torch.random.fork_rng():
            torch.manual_seed(3*seed + i)
            model = prepared(classes, seed)
            params = put_on(model, arm)
        look, rows = partial(hits, model, *sounds(task, split, seed)), sounds(task, 'train', seed)
        middle = look if arm in ('lora', 'bitfit') else list
        halfway += trained(model, params, *rows, steps, BATCH, rate, seed, middle)
        own[task] = look()
    every = [h for of in own.values() for h in of]
    return dict({t: sum(h)/len(h) for t, h in own.items()}, accuracy=sum(every)/len(every),
                questions=len(every), items=dict(accuracy=every),
                **({'halfway': sum(halfway)/len(halfway)} if halfway else {}))

def derive(found):
    """The better of LoRA and BitFit in each seed, also after half of its steps; the worse of the two that version 3
    puts ahead, and the better of the rest; and what three times as many parameters add"""
    out = {}
    if {'lora', 'bitfit'} <= set(found):
        best = max((found[a] for a in ('lora', 'bitfit')), key=lambda o: o['accuracy'])
        out['better'] = dict(accuracy=best['accuracy'])
        out['halfway'] = dict(accuracy=best['halfway'])
    if {'adapter', 'lora', 'bitfit', 'prompt'} <= set(found):
        right = {a: o['accuracy'] for a, o in found.items()}
        out['leaders'] = dict(accuracy=min(right['adapter'], right['lora']))
        out['others'] = dict(accuracy=max(right['bitfit'], right['prompt']))
    for a in ('adapter', 'lora', 'prompt'):
        if {a, f'{a}_large'} <= set(found):
            more = found[f'{a}_large']['accuracy'] - found[a]['accuracy']
            out[f'{a}_growth'] = dict(growth=more, accuracy=found[f'{a}_large']['accuracy'])
    return out

def identities():
    sizes = {a: size(a) for a in ARMS}
    few = [sizes[a] for a in ('adapter', 'lora', 'bitfit', 'prompt')]
    times = [sizes[f'{a}_large']/sizes[a] for a in ('adapter', 'lora', 'prompt')]
    model, x = prepared(6, 0), sounds('order', 'train', 0)[0][:4]
    with torch.no_grad():
        every = model.classifier(model.vit(x).last_hidden_state.mean(1))
        before = answers(model, x)
        put_on(model, 'adapter')
        same = torch.equal(answers(model, x), before)
    return {'the few parameters differ by at most a tenth': max(few) < 1.1*min(few),
            'adapters have the fewest of them, or nearly so': sizes['adapter'] < 1.01*min(few),
            'the many are three times as many, within a tenth': all(2.7 < t < 3.3 for t in times),
            'adapters start as the base': same,
            'without prompts an answer is read from all tokens':
                torch.allclose(before, every, atol=1e-5),
            'a seed repeats its sounds': torch.equal(sounds('order', 'test', 1)[0],
                                                     sounds.__wrapped__('order', 'test', 1)[0])}
