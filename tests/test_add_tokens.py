"Tokens that are added to a model: rows that every method trains, kept wherever the run goes"
import copy, json
import pytest, torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer
import ftlab
from ftlab import cli
from ftlab.adapters.attach import attach
from ftlab.adapters.store import load_delta
from ftlab.core.loading import load, skeleton
from ftlab.core.model import notes_of
from ftlab.core.new_tokens import (add_to, give_rows, given_tokens, new_row_masks, new_rows,
                                   token_tables, tokens_json)
from ftlab.instruments.bench import Base
from ftlab.instruments.card import card
from ftlab.instruments.compare import Comparison
from ftlab.instruments.report import read_run
from ftlab.methods import get
from ftlab.trainers.fit import fit
from test_contract import RECIPES
from tiny import tiny
from toys import TOK, lab_data, logits, toy

TOKENS = ['<tool_call>', '</tool_call>', dict(content='<|turn|>', special=True)]
ROWS = [dict(prompt=f'<tool_call> sort {a} {b}', response=f'{a} </tool_call>')
        for a in 'abcdefghij' for b in 'klm']

def saved(model, at, tok=TOK):
    model.save_pretrained(at)
    tok.save_pretrained(at)
    return str(at)

def grown(tied:bool=True, seed:int=0):
    "A toy with three new tokens, and its tokenizer"
    model, tok = toy(seed=seed, tied=tied), copy.deepcopy(TOK)
    ids, _ = add_to(tok, TOKENS)
    give_rows(model, ids, TOK.get_vocab().values())
    return model, tok

def tables(model) -> dict:
    return {n: p.detach().clone() for n, p in token_tables(model).items()}

def rows_that_differ(a, b) -> list[int]:
    other = (a != b).any(-1) if a.ndim > 1 else a != b
    return other.nonzero().flatten().tolist()

# ---------- which tokens

@pytest.mark.parametrize('tokens, said', [
    ('<a>', 'must be a list'), ([''], 'more than spaces'), (['  '], 'more than spaces'), (['<a>', '<a>'], 'twice'),
    (['<a>', AddedToken('<a>', special=True)], 'twice'), ([3], 'a token is a text'),
    ([dict(text='<a>')], 'add_tokens holds')])
def test_wrong_tokens_are_refused(tokens, said):
    with pytest.raises(ValueError, match=said):
        given_tokens(tokens)

def test_tokens_go_through_json():
    through = tokens_json(given_tokens(TOKENS))
    assert tokens_json(TOKENS) == TOKENS == json.loads(json.dumps(through))
    assert tokens_json(None) is None

def test_the_tokenizer_knows_them_and_old_ones_are_counted(tmp_path):
    model, tok = load(saved(toy(), tmp_path/'m'), add_tokens=[*TOKENS, 'sort'])
    n = len(TOK)
    assert tok('sort <tool_call> a').input_ids[1] == n and new_rows(model) == [n, n + 1, n + 2]
    assert tok.decode([n, n + 2], skip_special_tokens=True).strip() == '<tool_call>'
    first, second = notes_of(model)
    assert "3 of 4 tokens to add are new" in first and "it knew 'sort' already" in first
    assert 'rows for 3 tokens' in second
    model, _ = load(saved(toy(), tmp_path/'again'), add_tokens=['sort'])
    assert not new_rows(model) and not new_row_masks(model)
    assert len(token_tables(model)['model.embed_tokens.weight']) == n

def test_what_a_token_does_to_the_tokenizer_is_said(tmp_path):
    folder = saved(toy(), tmp_path/'m')
    model, _ = load(folder, add_tokens=['so'])
    assert "'so' now cuts words that hold it, such as" in notes_of(model)[0]
    for t in (AddedToken('so', single_word=True, normalized=False), '<so>'):
        assert 'cuts' not in notes_of(load(folder, add_tokens=[t])[0])[0]
    model, tok = load(folder, add_tokens=[dict(content='sort', special=True)])
    assert "not special, and left so: 'sort'" in notes_of(model)[0]
    assert tok.decode(tok('sort').input_ids, skip_special_tokens=True).strip() == 'sort'

def test_tokens_that_a_tokenizer_has_and_the_model_lacks_get_rows(tmp_path):
    tok = copy.deepcopy(TOK)
    add_to(tok, TOKENS)
    folder = saved(toy(), tmp_path/'m', tok)
    model, again = load(folder, add_tokens=TOKENS)
    assert new_rows(model) == tok.convert_tokens_to_ids(['<tool_call>', '</tool_call>', '<|turn|>'])
    assert len(again) == len(tok) == len(model.get_input_embeddings().weight)
    assert 'whose rows are not new' not in notes_of(model)[0]
    assert not new_rows(load(folder)[0]) and not new_rows(load(folder, add_tokens=['sort'])[0])

def test_a_model_that_reads_images_takes_no_tokens(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4)).save_pretrained(tmp_path/'v')
    for read in (load, skeleton):
        assert read(tmp_path/'v')[1] is None
        with pytest.raises(ValueError, match='no tokens can be added'):
            read(tmp_path/'v', add_tokens=TOKENS)

# ---------- their rows

# how many tables have one row a token: an untied head counts, and its bias
FAMILIES = {'llama': 2, 'llama tied': 1, 'gpt2': 1, 'phi': 3, 'opt': 1, 'qwen2': 2, 'gemma2': 1,
            'bert': 2}

@pytest.mark.parametrize('family', FAMILIES)
def test_new_rows_begin_as_the_mean_and_old_ones_stay(family):
    model = tiny(family.split()[0], **(dict(tie_word_embeddings=True) if 'tied' in family else {}))
    was = tables(model)
    assert give_rows(model, [64, 65], range(64)) == 2
    now = tables(model)
    assert now.keys() == was.keys() and len(now) == FAMILIES[family]
    for n in was:
        assert torch.equal(now[n][:64], was[n]), n
        for row in now[n][64:]:
            torch.testing.assert_close(row, was[n].mean(0), atol=1e-6, rtol=0)
        assert int(new_row_masks(model)[n].sum()) == now[n][64:].numel()

def test_rows_do_not_depend_on_the_number_of_threads():
    found = []
    for n in (1, 2):
        had = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            found.append(tables(grown(tied=False)[0]))
        finally:
            torch.set_num_threads(had)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])

def test_spare_rows_are_taken_before_the_embedding_grows(tmp_path):
    wide = toy(tied=False)
    wide.resize_token_embeddings(len(TOK) + 5)
    folder = saved(wide, tmp_path/'wide')
    model, tok = load(folder, add_tokens=TOKENS)
    assert len(model.lm_head.weight) == len(TOK) + 5
    assert any('spare rows' in n for n in notes_of(model))
    run = fit(model, tok, ftlab.data(ROWS), get('lora'), steps=3, batch_size=4, progress=False)
    before, after = run.delta.attached.weight('model.embed_tokens.weight')
    assert set(rows_that_differ(before, after)) <= set(new_rows(model)) and (before != after).any()
    files = load(folder)[0].get_input_embeddings().weight
    assert torch.equal(before[len(TOK) + 3:], files[len(TOK) + 3:])

def test_a_skeleton_has_the_same_shapes(tmp_path):
    folder = saved(toy(tied=False), tmp_path/'m')
    bones, tok = skeleton(folder, add_tokens=TOKENS)
    whole, _ = load(folder, add_tokens=TOKENS)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (bones, whole)]
    assert shapes[0] == shapes[1]
    assert len(tok) == len(TOK) + 3

# ---------- every method trains them, once

# the learner of 'watched' has a fixed size; prompts (tests/test_yardsticks_prompts.py), grafts and what reads the
# input embedding refuse
@pytest.mark.parametrize('name', sorted(
    RECIPES.keys() - {'watched', 'prompt_tuning', 'prefix_tuning', 'grafting', 'levi',
                      'learning_to_modulate'}))
def test_every_method_trains_the_new_rows(name, tmp_path):
    def run_on(model, tok):
        run = fit(model, tok, lab_data(), RECIPES[name](), steps=2*len(RECIPES[name]().stages) or 2,
                  batch_size=8, lr=1e-2, progress=False)
        return run
    bare, tok = grown()
    del bare.new_rows
    without, (model, tok) = run_on(bare, tok), grown()
    base, off = tables(model)['model.embed_tokens.weight'], logits(model)
    run = run_on(model, tok)
    name = 'model.embed_tokens.weight'
    def embedding(r):
        return r.delta.attached.values().get(name, base)
    free, moved = (rows_that_differ(base, embedding(r)) for r in (without, run))
    assert set(new_rows(model)) <= set(moved), 'a new row did not train'
    if not free:
        assert set(moved) == set(new_rows(model)), 'an old row moved'
        assert run.cost['trainable'] == without.cost['trainable'] + base[new_rows(model)].numel()
    else:
        assert run.cost['trainable'] - without.cost['trainable'] <= base[new_rows(model)].numel()
    tuned = logits(model)
    with run.disabled():
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), tuned)
    run.delta.save(tmp_path/'delta.safetensors')
    again, _ = grown()
    load_delta(again, tmp_path/'delta.safetensors')
    assert torch.equal(logits(again), tuned)

def test_an_entry_has_one_change():
    model, _ = grown(tied=False)
    masks, name = new_row_masks(model), 'model.embed_tokens.weight'
    own = torch.zeros_like(masks[name])
    own[3, 4] = own[-1, 0] = True
    att = attach(model, {name: own}, None, beside=masks)
    assert (len(att.deltas[name].value) == 3*32 + 1 and att.beside == {'lm_head.weight'}
            and list(att.own) == [name])
    att.detach()
    att = attach(model, {name: True, 'lm_head.weight': True}, beside=masks)
    assert not att.deltas and not att.beside

def test_the_head_of_an_untied_model_trains_too():
    model, tok = grown(tied=False)
    was = tables(model)
    run = fit(model, tok, ftlab.data(ROWS), get('lora'), steps=3, batch_size=4, progress=False)
    now = run.delta.attached.values()
    for n in was:
        moved = rows_that_differ(now[n], was[n])
        assert moved and set(moved) <= set(new_rows(model)), n

def test_a_classifier_trains_them_beside_its_head(tmp_path):
    from toys import classifier, label_data
    folder = saved(classifier(), tmp_path/'c')
    model, tok = load(folder, labels=label_data().labels, head='new', add_tokens=TOKENS)
    rows = [dict(text=f'<tool_call> {r["text"]}', label='abc'[r['label']])
            for r in label_data().train[:40]]
    run = fit(model, tok, ftlab.data(rows), get('lora'), steps=2, batch_size=8, progress=False)
    before, after = run.delta.attached.weight('bert.embeddings.word_embeddings.weight')
    assert rows_that_differ(before, after) == [new_rows(model)[0]]

# ---------- wherever the run goes

def test_a_run_that_is_cut_off_goes_on_bit_for_bit(tmp_path):
    class Stop:
        def after_step(self, state):
            if state.step == 2:
                raise KeyboardInterrupt
    how = dict(steps=4, batch_size=4, progress=False, save_every=1)
    def run(out, **more):
        return fit(*grown(tied=False), ROWS, get('lora'), out=tmp_path/out, **how | more)
    whole = run('a')
    run('b', callbacks=(Stop(),))
    again = run('b', resume=True)
    assert len(again.log) == 4 and torch.equal(logits(again.model), logits(whole.model))

def tuned_by_lora(model, tok, method='lora'):
    return fit(model, tok, ftlab.data(ROWS), get(method), steps=3, batch_size=4, progress=False,
               lr=1e-2)

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_exported_folder_loads_in_transformers(dtype, tmp_path):
    folder = saved(toy(tied=False), tmp_path/'m')
    model, tok = load(folder, add_tokens=TOKENS, dtype=dtype)
    old = model.get_input_embeddings().weight.detach()[:len(TOK)].clone()
    run = tuned_by_lora(model, tok)
    run.export(tmp_path/'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/'out')
    t = AutoTokenizer.from_pretrained(tmp_path/'out')
    ids = t('<tool_call> sort a <|turn|>', return_tensors='pt').input_ids
    assert torch.equal(ids, tok('<tool_call> sort a <|turn|>', return_tensors='pt').input_ids)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5 if dtype == 'float32' else .02, rtol=0)
    assert torch.equal(theirs.get_input_embeddings().weight[:len(TOK)], old)

@pytest.mark.parametrize('tied', [True, False])
def test_peft_holds_them_and_a_report_reads_that(tied, tmp_path):
    peft = pytest.importorskip('peft')
    from ftlab.instruments.elsewhere import read_tuned
    folder = saved(toy(tied=tied), tmp_path/'m')
    model, tok = load(folder, add_tokens=TOKENS)
    run = tuned_by_lora(model, tok)
    run.export(tmp_path/'p', form='peft')
    said = json.loads((tmp_path/'p'/'adapter_config.json').read_text())['trainable_token_indices']
    assert all(ids == new_rows(model) for ids in said.values()) and len(said) == 1 + (not tied)
    ids = tok('<tool_call> sort a <|turn|>', return_tensors='pt').input_ids
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'p').eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    there = read_tuned(tmp_path/'p', folder, ftlab.data(ROWS))
    torch.testing.assert_close(there.model(ids).logits, model(ids).logits, atol=1e-5, rtol=0)

def test_peft_cannot_hold_them_in_a_change_of_low_rank(tmp_path):
    model, tok = load(saved(toy(tied=False), tmp_path/'m'), add_tokens=TOKENS)
    run = tuned_by_lora(model, tok, "lora(targets='embed_tokens|q_proj')")
    with pytest.raises(ValueError, match='has rows of new tokens'):
        run.export(tmp_path/'p', form='peft')

def begin_alike(params, start):
    "Give peft's LoRA the values that ours began with"
    for n, p in params.items():
        if 'lora' in n:
            own = n.removeprefix('base_model.model.').replace('.default.weight', '')
            p.data.copy_(start[own.replace('.lora_', '.weight::')])

def train_plainly(model, params, rows, lr, steps):
    from ftlab.core.batches import batch_at
    opt = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0.)
    model.train()
    for s in range(steps):
        model(**batch_at(rows, s, 8, TOK.pad_token_id)).loss.backward()
        opt.step()
        opt.zero_grad()

@pytest.mark.peer('new_row_masks', 'peft',
                  'rows of new tokens after three steps with LoRA', tolerance=1e-6)
@pytest.mark.parametrize('tied', [True, False])
def test_trained_as_peft_trains_them(tied, tolerance):
    "LoRA with new rows, held against `trainable_token_indices` on the same tensors"
    peft = pytest.importorskip('peft')
    from ftlab.adapters.modules.lora import lora
    from ftlab.core.tokens import encode_all
    start, lr, steps, made = {}, 3e-3, 3, grown(tied)
    class Start:
        def before_fit(self, state):
            start.update({n: p.detach().clone() for n, p in state.attached.parameters().items()})
    data = ftlab.data(ROWS)
    run = fit(*made, data, lora(r=4, alpha=8., targets='q_proj|v_proj'), steps=steps, batch_size=8,
              lr=lr, clip=None, schedule='constant', callbacks=(Start(),), progress=False)
    model, (base, tok) = made[0], grown(tied)
    ends = ['embed_tokens'] + ['lm_head']*(not tied)
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], lora_dropout=0.,
        trainable_token_indices={e: new_rows(base) for e in ends}))
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    begin_alike(params, start)
    assert sum(p.numel() for p in params.values()) == run.cost['trainable']
    train_plainly(theirs, params, encode_all(data.train, tok, 'text', 128), lr, steps)
    now = run.delta.attached.values()
    for e in ends:
        n = next(n for n in now if e in n)
        got = next(p for k, p in params.items() if e in k)
        torch.testing.assert_close(now[n][new_rows(model)], got.detach(), atol=tolerance, rtol=0)
        assert (got - token_tables(grown(tied)[0])[n][new_rows(model)]).abs().max() > 1e-3

def test_gguf_holds_them(tmp_path):
    gguf = pytest.importorskip('gguf')
    from served import served
    model, tok = served('llama')
    old = list(tok.get_vocab().values())
    ids, _ = add_to(tok, TOKENS)
    give_rows(model, ids, old)
    rows = [dict(r, prompt='the ' + r['prompt']) for r in ROWS]
    run = fit(model, tok, rows, get('lora'), steps=2, batch_size=4, progress=False, lr=1e-2)
    run.export(tmp_path/'m.gguf', form='gguf')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='m.gguf', dtype=torch.float32)
    x = torch.tensor([[3, *ids, 5]])
    torch.testing.assert_close(theirs.eval()(x).logits, model(x).logits, atol=1e-4, rtol=0)
    said = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path/'m.gguf').fields.items()}
    texts = [said['tokenizer.ggml.tokens'][i] for i in ids]
    assert texts == [t.content for t in given_tokens(TOKENS)]
    kinds, K = said['tokenizer.ggml.token_type'], gguf.TokenType
    assert [kinds[i] for i in ids] == [K.USER_DEFINED, K.USER_DEFINED, K.CONTROL]

# ---------- compare and the shell

def test_a_base_is_made_again_with_its_tokens(tmp_path):
    folder = saved(toy(), tmp_path/'m')
    a, b, bare = (Base(folder, add_tokens=t) for t in (TOKENS, TOKENS, None))
    assert a.fingerprint(0) == b.fingerprint(1) != bare.fingerprint(0)
    assert len(a(0)[1]) == len(TOK) + 3
    with pytest.raises(ValueError, match='goes with the name'):
        Base((toy(), TOK), add_tokens=TOKENS)

def test_runs_are_shared_only_if_the_same_rows_train(tmp_path, monkeypatch):
    "A grown model that is saved has the same weights and tokenizer, and no new rows"
    monkeypatch.setenv('FTLAB_RUNS', str(tmp_path/'runs'))
    folder = saved(toy(tied=False), tmp_path/'m')
    model, tok = load(folder, add_tokens=TOKENS)
    grown_folder = saved(model, tmp_path/'g', tok)
    by_hand = copy.deepcopy(model)
    by_hand.new_rows = new_rows(model)[:1]
    prints = {Base(m).fingerprint(0) for m in (grown_folder, (model, tok), (by_hand, tok))}
    assert len(prints) == 3 and Base(folder, add_tokens=TOKENS).fingerprint(0) in prints
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, ROWS*2)))
    def trained(model, **more):
        c = ftlab.compare(['lora'], model, ftlab.data(str(tmp_path/'d.jsonl')), seeds=1, steps=2,
                          tune=False, items=4, old_items=2, batch_size=4, out=tmp_path/'c',
                          resume=True, progress=False, **more)
        return int(c.table['trained'].iloc[0])
    without = trained(grown_folder)
    assert trained(folder, add_tokens=TOKENS) - without == 2*3*32

def test_the_card_repeats_only_what_it_can(tmp_path):
    folder = saved(toy(), tmp_path/'m')
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
    data = ftlab.data(str(tmp_path/'d.jsonl'))
    def text(model, tok):
        return card(fit(model, tok, data, get('lora'), steps=2, batch_size=4, progress=False))
    assert f'add_tokens={TOKENS!r}' in text(*load(folder, add_tokens=TOKENS))
    model, tok = load(folder)
    model.new_rows = tok.convert_tokens_to_ids(['sort'])
    assert 'got rows for tokens after its files were read' in text(model, tok)
    assert 'add_tokens' not in text(*load(folder))

def test_the_winner_is_trained_with_the_same_tokens(tmp_path):
    folder = saved(toy(), tmp_path/'m')
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, ROWS*2)))
    given = ['--model', folder, '--data', str(tmp_path/'d.jsonl'), '--add-tokens', '<tool_call>,</tool_call>']
    assert cli.main(['compare', *given, '--add-special-tokens', '<|turn|>', '--methods', 'lora', '--seeds', '1',
                     '--steps', '2', '--no-tune', '--items', '4', '--old-items', '2', '--batch-size', '4',
                     '--out', str(tmp_path/'c'), '--quiet']) == 0
    assert json.loads((tmp_path/'c'/'result.json').read_text())['inputs']['add_tokens'] == TOKENS
    assert cli.main(['winner', str(tmp_path/'c'), '--method', 'lora', '--out', str(tmp_path/'w'), '--export',
                     str(tmp_path/'e')]) == 0
    record = json.loads((tmp_path/'w'/'run.json').read_text())
    assert record['add_tokens'] == TOKENS
    run = read_run(tmp_path/'w')
    assert new_rows(run.model) == [len(TOK) + i for i in range(3)]
    with pytest.raises(ValueError, match='not the one of the comparison'):
        Comparison.read(tmp_path/'c'/'result.json').train('lora', model=load(folder))

def test_the_shell(tmp_path, capsys):
    folder = saved(toy(), tmp_path/'m')
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
    given = ['--model', folder, '--data', str(tmp_path/'d.jsonl'), '--add-tokens', '<tool_call>,</tool_call>']
    fitted = ['fit', *given, '--method', 'lora', '--steps', '2', '--batch-size', '4']
    assert cli.main([*fitted, '--out', str(tmp_path/'r'), '--export', str(tmp_path/'e')]) == 0
    assert "add_tokens=['<tool_call>', '</tool_call>']" in (tmp_path/'e'/'README.md').read_text()
    assert "2 of 2 tokens to add are new" in capsys.readouterr().out
    assert cli.main(['merge', str(tmp_path/'r'), '--out', str(tmp_path/'merged')]) == 0
    assert len(load(tmp_path/'merged')[1]) == len(TOK) + 2
    assert cli.main(['show', *given]) == 0 and '│<tool_call>│' in capsys.readouterr().out
    assert cli.main([*fitted, '--dry-run', '--json']) == 0
    planned = json.loads(capsys.readouterr().out)
    trained = json.loads((tmp_path/'r'/'run.json').read_text())['cost']['trainable']
    assert str(trained) in json.dumps(planned)
    assert cli.main([*fitted[:-6], '--method', 'lora', '--steps', '3', '--batch-size', '4', '--add-tokens', '<b>',
                     '--out', str(tmp_path/'r')]) == 1
    again = ['fit', *given[:-1], '<a>,<a>', '--steps', '1', '--out', str(tmp_path/'x')]
    assert cli.main(again) == 1
    assert "--add-tokens holds '<a>' twice" in capsys.readouterr().err

def test_a_starting_notebook_names_them_once(tmp_path):
    folder = saved(toy(), tmp_path/'m')
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
    assert cli.main(['init', '--model', folder, '--data', str(tmp_path/'d.jsonl'), '--add-tokens',
                     '<tool_call>,</tool_call>', '--out', str(tmp_path/'s.ipynb')]) == 0
    cells = json.loads((tmp_path/'s.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells)
    assert text.count("TOKENS = ['<tool_call>', '</tool_call>']") == 1
    assert text.count('add_tokens=TOKENS') == 2
    assert "'--add-tokens=<tool_call>,</tool_call>'" in text
