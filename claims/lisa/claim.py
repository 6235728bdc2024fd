"What the claim says of memory, and what LISA is: counted on the model of the claim"
from dataclasses import replace
import torch
import ftlab
from ftlab.adapters.modules.lora import lora
from ftlab.trainers.optimizers.lisa import BlocksInTurn, block_of

RANK, STEPS = 34, 12 # of LoRA; four periods of three steps

class Look:
    "After each step: the blocks that moved, those that should have, and the values that AdamW keeps"
    def __init__(self):
        self.seen, self.steps = [], []

    def before_fit(self, state):
        self.was = {n: p.detach().clone() for n, p in state.model.named_parameters()}

    def after_step(self, state):
        now = {n: p.detach().clone() for n, p in state.model.named_parameters()}
        moved = {b for n in now if (b := block_of(n)) and not torch.equal(now[n], self.was[n])}
        active = {f'model.layers.{i}' for i in state.extra['active']}
        state = self.steps[0].opt.state
        held = sum(v.numel() for d in state.values() for v in d.values() if v.ndim)
        self.was = now
        self.seen.append((moved, active, held))

def watched(keep_state):
    model, tok = ftlab.load('lab-s')
    look = Look()
    class Kept(BlocksInTurn):
        def __init__(self, *args):
            super().__init__(*args, gamma=1, period=3, keep_state=keep_state)
            look.steps.append(self)
    ftlab.fit(model, tok, ftlab.data('new-procedure', n=100),
              replace(ftlab.methods.lisa(), step=Kept), steps=STEPS, batch_size=8, weight_decay=.1,
              callbacks=(look,), progress=False)
    return look.seen

def identities() -> dict[str, bool]:
    dropped, kept = watched(False), watched(True)
    model, tok = ftlab.load('lab-s')
    size = sum(p.numel() for p in model.parameters())
    run = ftlab.fit(model, tok, ftlab.data('new-procedure', n=100), lora(r=RANK, alpha=2.*RANK),
                    steps=1, batch_size=8, progress=False)
    most = max(n for *_, n in dropped)
    return {'the blocks that rest are bit-equal, weight decay and all': all(
                moved == active for moved, active, _ in dropped + kept),
            'more than one block had a turn': len({min(a) for _, a, _ in dropped}) > 1,
            'AdamW keeps less than half of what full fine-tuning needs': most < size,
            'and as much as that of LoRA of rank 34, to a fiftieth': abs(
                most/(2*run.cost['trainable']) - 1) < .02,
            'with the state kept, as in the released code, it is half as much again': max(
                n for *_, n in kept) > 1.5*most}
