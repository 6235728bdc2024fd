"What the claim says of memory, and what LISA is: counted on the model of the claim"
from dataclasses import replace
import torch
import ftlab
from ftlab.trainers.optimizers.lisa import BlocksInTurn, block_of

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s')
    steps, seen, size = [], [], sum(p.numel() for p in model.parameters())
    class Kept(BlocksInTurn):
        def __init__(self, *args):
            super().__init__(*args, gamma=1, period=3)
            steps.append(self)
    class Look:
        def before_fit(self, state):
            self.was = {n: p.detach().clone() for n, p in state.model.named_parameters()}

        def after_step(self, state):
            now = {n: p.detach().clone() for n, p in state.model.named_parameters()}
            moved = {b for n in now if (b := block_of(n)) and not torch.equal(now[n], self.was[n])}
            numbers = sum(v.numel() for d in steps[0].opt.state.values()
                          for v in d.values() if v.ndim)
            self.was = now
            seen.append((moved, {f'model.layers.{i}' for i in state.extra['active']}, numbers))
    ftlab.fit(model, tok, ftlab.data('new-procedure', n=100),
              replace(ftlab.methods.lisa(), step=Kept), steps=9, batch_size=8, weight_decay=.1,
              callbacks=(Look(),), progress=False)
    return {'the blocks that rest are bit-equal, weight decay and all': all(
                moved == active for moved, active, _ in seen),
            'more than one block had a turn': len({min(a) for _, a, _ in seen}) > 1,
            "the optimiser remembers less than half of what full "
            "fine-tuning's does": max(n for *_, n in seen) < size}
