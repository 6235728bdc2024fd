"What is asked of every paper's loss: the same with given logits, and in one pass that keeps none"
import torch
from ftlab.core.state import State
from ftlab.trainers import objective
from ftlab.trainers.fit import fit
from tiny import inputs_for, tiny
from toys import TOK, lab_data, toy


class Fixed(torch.nn.Module):
    "A model that says these logits, whatever it is asked"
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids):
        return type('Out', (), dict(logits=self.logits))


def labelled(family: str) -> tuple[torch.nn.Module, dict]:
    "A model of a family, and a batch whose first row begins without labels"
    model, batch = tiny(family), inputs_for(family)
    batch['labels'] = batch['input_ids'].clone()
    batch['labels'][0, :3] = -100
    return model, batch


def row_loss(model, row):
    "The mean loss of the labelled tokens of one row, written out"
    ids, labels = torch.tensor(row['input_ids']), torch.tensor(row['labels'])
    logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
    said = labels[1:] != -100
    return -logp[said].gather(1, labels[1:][said][:, None]).mean()


def assert_one_pass_has_the_same_gradient(recipe, model, batch, monkeypatch, **at) -> tuple:
    "Compare loss and gradients with logits in memory and without; return the loss and the last state"
    ends = []
    for heavy in (1 << 60, 0):
        monkeypatch.setattr(objective, '_HEAVY', heavy)
        state = State(model, **at)
        state.batch, state.batches, state.whole_logits = batch, [batch], False
        state.count = int((batch['labels'][:, 1:] != -100).sum())
        loss = recipe.objective(state)
        ends.append((loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    for a, b in zip(*ends):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    return ends[0][0], state


def assert_one_pass_ends_alike(make, monkeypatch, steps: int = 10, seed: int = 0) -> None:
    "Train with logits in memory and without, each time by a new recipe, and compare the changes"
    ends = []
    for heavy in (1 << 60, 0):
        monkeypatch.setattr(objective, '_HEAVY', heavy)
        run = fit(toy(), TOK, lab_data(), make(), steps=steps, lr=3e-4, batch_size=8, seed=seed,
                  progress=False)
        ends.append(run.delta.attached.changes())
    size = sum(t.square().sum() for t in ends[0].values())**.5
    far = sum((ends[0][n] - ends[1][n]).square().sum() for n in ends[0])**.5
    assert far < .02*size and size > 0
