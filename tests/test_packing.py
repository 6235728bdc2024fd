"Packing: a row in a line costs, and teaches, what it does alone"
import pytest, torch
from ftlab.core.batches import PACKS, bins, collate, pack, packing
from ftlab.core.data import data
from ftlab.core.tokens import IGNORE, encode_all
from ftlab.lab.models import lab_tokenizer
from ftlab.trainers.objective import token_nll
from tiny import tiny

TOK = lab_tokenizer()
def rows(kind='text'):
    "Encoded rows of very different lengths with token ids that the tiny models know"
    g = torch.Generator().manual_seed(0)
    out = []
    for n in (5, 17, 3, 9, 2, 12, 7, 4, 21, 6):
        ids = torch.randint(4, 64, (n,), generator=g).tolist()
        out.append(
            dict(input_ids=ids, labels=ids if kind == 'lm' else [IGNORE]*(n//2) + ids[n//2:]))
    return out

def prices(model, batch):
    "What each token with a loss costs, in the order of the rows"
    nll = token_nll(
        model(**{k: v for k, v in batch.items() if k not in ('labels', 'tokens')}).logits,
        batch['labels'])
    return nll[batch['labels'][:, 1:] != IGNORE]

@pytest.mark.parametrize('kind', ['text', 'lm'])
@pytest.mark.parametrize('family', PACKS)
def test_a_token_costs_what_it_costs_alone(family, kind):
    m, r = tiny(family), rows(kind)
    line = packing(m, kind, 30)(r, 1)
    with torch.no_grad():
        packed, alone = prices(m, line), prices(m, collate(r, 1))
    assert (len(line['input_ids']) < len(r) and len(packed) == len(alone)
            and torch.allclose(packed, alone, atol=2e-5))

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen2'])
def test_the_gradient_is_the_same(family):
    a, b, r = tiny(family), tiny(family), rows()
    prices(a, collate(r, 1)).mean().backward()
    prices(b, packing(b, 'text', 64)(r, 1)).mean().backward()
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5*max(1, float(p.grad.abs().max()))), n

def test_leaking_would_show():
    """The test above has teeth: without the block mask, or without restarting positions,
    prices differ"""
    for family in ('llama', 'gpt2'):
        m, r = tiny(family), rows()
        line = pack(r, 64, 1)
        with torch.no_grad():
            alone = prices(m, collate(r, 1))
            for worse in ({k: v for k, v in line.items() if k != 'attention_mask'},
                          {k: v for k, v in line.items() if k != 'position_ids'}):
                if family == 'llama' and 'position_ids' not in worse:
                    continue # rotary positions are relative: inside its block a row cannot tell where the line began
                assert not torch.allclose(prices(m, worse), alone, atol=1e-3)

def test_no_row_reaches_another():
    m, r = tiny('llama'), rows()
    line = pack(r, 64, 1)
    first = len(r[0]['input_ids'])
    x = m.get_input_embeddings()(line['input_ids']).detach().requires_grad_()
    out = m(inputs_embeds=x, attention_mask=line['attention_mask'], position_ids=line['position_ids']).logits
    out[0, first:int(line['tokens'][0])].sum().backward()
    assert not x.grad[0, :first].any() and x.grad[0, first:].any()

def test_nothing_is_lost_and_the_order_stays():
    r = rows('lm')
    b = pack(r, 30, 1)
    ids = [i for line, n in zip(b['input_ids'], b['tokens']) for i in line[:n].tolist()]
    assert (ids == [i for x in r for i in x['input_ids']]
            and int(b['tokens'].sum()) == sum(len(x['input_ids']) for x in r))
    assert int((b['labels'][:, 1:] != IGNORE).sum()) == sum(l != IGNORE for x in r for l in x['labels'][1:])
    assert ([len(x) for x in bins([5, 5, 5, 11, 2], 11)] == [2, 1, 1, 1]
            and [list(x) for x in bins([3], 3)] == [[0]])
    assert all(torch.isfinite(
                   tiny('gpt2')(**{k: v for k, v in b.items()
                                   if k not in ('labels', 'tokens')}).logits).flatten().tolist())

def test_real_rows_of_the_lab():
    enc = encode_all(data('new-procedure', n=64).train, TOK, 'text')
    m = tiny('qwen2', vocab_size=len(TOK), max_position_embeddings=128)
    with torch.no_grad():
        packed, alone = prices(m, packing(m, 'text', 128)(enc, 0)), prices(m, collate(enc, 0))
    assert torch.allclose(packed, alone, atol=2e-5)

def test_refusals():
    m = tiny('llama')
    for kind in ('label', 'image'):
        with pytest.raises(ValueError, match=f"kind '{kind}' cannot be packed"):
            packing(m, kind, 8)
    with pytest.raises(ValueError, match="'bert'.*packing=False"):
        packing(tiny('bert'), 'text', 8)
    with pytest.raises(ValueError, match='one label or none'):
        pack([dict(input_ids=[1, 2], labels=1)], 8, 0)
    with pytest.raises(ValueError, match='17 tokens and a line only 10'):
        pack(rows(), 10, 0)
    with pytest.raises(ValueError, match='attend only to the last 4 tokens'):
        packing(tiny('mistral', sliding_window=4), 'text', 8)
    m.set_attn_implementation('eager')
    with pytest.raises(ValueError, match="uses 'eager'"):
        packing(m, 'text', 8)
