"A change that is attached to a model hides nothing of its anatomy, and adds nothing to it"
import pytest
from ftlab import methods
from ftlab.adapters.delta import attach
from ftlab.core.anatomy import anatomy
from tiny import tiny


def said(a):
    "What an anatomy says of each parameter, whatever their order"
    return (a.locations, a.shapes, a.head, a.embedding, a.norms, a.transposed,
            [(b.name, b.attention, b.mlp, b.norms, b.biases) for b in a.blocks])


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gpt_neox', 'bert'])
@pytest.mark.parametrize('method', ['lora', 'dora', 'shira', 's2ft', 'neuroada'])
def test_the_anatomy_is_that_of_the_plain_model(family, method):
    model = tiny(family)
    plain = said(anatomy(model))
    recipe = methods.get(method)
    change = attach(model, recipe.select(model, None, 0), recipe.delta)
    assert any('delta_' in n or 'parametrizations' in n for n, _ in model.named_parameters())
    assert said(anatomy(model)) == plain
    change.detach()
    assert said(anatomy(model)) == plain
