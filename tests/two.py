"""What two processes do together, started by test_processes.py through torchrun:
every case of CASES, its weights and log kept by the first process, what each saw by each"""
import json, sys
from pathlib import Path
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import torch, torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts, top
from ftlab.core.paper import Method
from ftlab.core.recipe import Learner, Loop, Recipe, Stages
from ftlab.trainers.callbacks import Every
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import kl_to_base, nll
from ftlab.trainers.rl.grpo import grpo
from toys import TOK, lab_data, logits, toy

class Forward:
    """A step without gradients: the difference of two prices along a random direction,
    the same in every process"""

    def __init__(self, params, settings):
        self.params, self.lr = list(params.values()), settings.lr

    @torch.no_grad()
    def __call__(self, state, prices):
        z = [torch.randn_like(p) for p in self.params]
        loss = []
        for k in (1e-3, -2e-3, 1e-3):
            for p, d in zip(self.params, z):
                p += k*d
            loss.append(float(sum(price() for price in prices)))
        for p, d in zip(self.params, z):
            p -= self.lr*(loss[0] - loss[1])/2e-3*d
        return loss[0]

    def tensors(self):
        return {}

    def load(self, tensors):
        pass

class Secret:
    "A step that keeps its gradients to itself"

    def __init__(self, params, settings):
        self.params = list(params.values())

    def __call__(self, state, prices):
        for p in prices:
            p().backward()
        return 0.

    def tensors(self):
        return {}

def head_loss(state):
    return (state.models['head'](state.logits)**2).sum()/state.count

def two_stages():
    def second(ctx):
        ctx.reset()
        return lora(r=2)

    return Recipe('two', loop=Stages(Recipe('norms', select=parts('norm')), second))

CASES = dict(
    full=Recipe, lora=lora, entries=lambda: Recipe('entries', select=top(torch.abs, .1)),
    reference=lambda: lora()*Recipe('kl', objective=nll() + kl_to_base(1.)),
    whole_reference=lambda: Recipe('kl', objective=nll() + kl_to_base(1.)),
    learner=lambda: Recipe(
        'learner', loop=Loop(
            learners={'head': Learner(lambda s: nn.Linear(len(TOK), 1), head_loss, lr=1e-2)})),
    forward=lambda: Recipe(Method('forward', lr=1e-3), select=parts('norm'), step=Forward),
    grpo=lambda: grpo(group=4, max_new_tokens=4, reward=lambda row, answer: len(answer)/10),
    stages=two_stages)
SHARDED = ('full', 'lora', 'entries', 'reference', 'whole_reference', 'learner', 'stages')
HOW = dict(steps=4, batch_size=8, lr=1e-2, clip=.05, weight_decay=.1, warmup=1, progress=False)

def one(name, accumulate=1, **more):
    return fit(toy(), TOK, lab_data(), CASES[name](), **dict(HOW, accumulate=accumulate) | more)

def weights_of(run):
    return {n: p.detach().clone().contiguous() for n, p in (run.model.named_parameters())}

class Seen:
    "The rows that this process prices, and what all processes say together"

    def __init__(self):
        self.rows, self.norms = [], []

    def before_fit(self, state):
        self.world = dist.get_world_size()

    def before_batch(self, state):
        mine = state.batches[dist.get_rank()::self.world]
        self.rows += [r for b in mine for r in b['input_ids'].tolist()]
        self.all = sum(len(b['input_ids']) for b in state.batches)

    def after_step(self, state):
        self.norms.append(state.extra.get('grad_norm'))

def main(out):
    torch.set_num_threads(1)
    told = {}
    for name, shard in [(n, False) for n in CASES] + [(n, True) for n in SHARDED]:
        look = Seen()
        run = one(name, shard=shard,
                  callbacks=(look, Every(2, lambda s: dict(norm=float(logits(s.model).norm())))))
        key = name + ' sharded'*shard
        mine = weights_of(run)
        together = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(together, sum(p.double().sum() for p in mine.values()).float()[None])
        told[key] = dict(rows=look.rows, norms=look.norms, all=look.all, world=look.world,
                         log=run.log, path=run.path, sums=[float(x) for x in together],
                         plain=all(type(p) is nn.Parameter for p in run.model.parameters()))
        if run.models:
            mine |= {f'learner.{n}': p.detach() for n, p in run.models['head'].named_parameters()}
        with run.disabled():
            told[key]['off'] = bool(torch.equal(logits(run.model), logits(toy())))
        if dist.get_rank() == 0:
            save_file({k: v.clone() for k, v in mine.items()}, out/f'{key}.safetensors')
            run.delta.save(out/f'{key}.delta')
    rank = torch.ones(1)*dist.get_rank() + 1
    dist.all_reduce(rank)
    told['collective'] = float(rank)
    resumed(out, told)
    refusals(told)
    (out/f'told-{dist.get_rank()}.json').write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()

def tracker():
    "A tracker that keeps what it gets"
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = 'kept', False, None

        def __init__(self):
            super().__init__()
            self.rows = []

        def store_init_configuration(self, values):
            self.rows.append('config')

        def log(self, values, step=None, **kw):
            self.rows.append(step)

        def finish(self):
            self.rows.append('finish')

    return Kept()

def resumed(out, told):
    "Runs that are killed at a step, resumed, and written by the first process"
    from test_fit import At

    def kill(state):
        raise RuntimeError('stopped here')

    for shard in (False, True):
        folder, kept = out/f'run-{shard}', tracker()
        how = dict(out=folder, save_every=2, shard=shard)
        try:
            one('full', callbacks=(At(3, kill),), trackers=(kept,), **how)
        except RuntimeError as e:
            told[f'killed {shard}'] = str(e)
        told[f'tracked {shard}'] = kept.rows
        run = one('full', resume=True, **how)
        if dist.get_rank() == 0:
            save_file({k: v.clone() for k, v in weights_of(run).items()}, out/f'resumed {shard}.safetensors')
        dist.barrier()
        told[f'files {shard}'] = sorted(p.name for p in folder.iterdir())
        told[f'steps {shard}'] = len(run.log)

class Batches:
    "A source that always gives one micro-batch of two rows"

    def next(self, state):
        ones = torch.ones(2, 4, dtype=torch.long)
        return [dict(input_ids=ones, labels=ones.clone())]

def refusals(told):
    "What is said of settings that two processes cannot share, and of prices that are no number"
    def refused(key, f):
        try:
            f()
            told[key] = None
        except Exception as e:
            told[key] = f'{type(e).__name__}: {e}'
    refused('uneven', lambda: fit(toy(), TOK, lab_data(), batch_size=7, steps=1, progress=False))
    refused('one batch',
            lambda: fit(toy(), TOK, lab_data(), Recipe('x', source=lambda s: Batches()), steps=1,
                        progress=False))
    refused('secret', lambda: fit(toy(), TOK, lab_data(), Recipe('secret', step=Secret), **HOW))

    def half_bad(state):
        bad = dist.get_rank() == 1 and state.step == 2
        return state.forward().square().mean()*(float('nan') if bad else 1.)

    for shard in (False, True):
        refused(f'not finite {shard}',
                lambda: fit(toy(), TOK, lab_data(), Recipe('bad', objective=half_bad), **HOW,
                            shard=shard))

if __name__ == '__main__':
    main(Path(sys.argv[1]))
