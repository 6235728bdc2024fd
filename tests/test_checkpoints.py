"""Checkpoints as they are found: labels in any order, padding, lengths, tokens without a row, half
precision, models that read more than text. Each kind is tried on many tiny random models."""
import itertools
import json
import warnings
import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from tiny import DECODERS, ENCODERS, HEADS, PLAIN, USUAL, tiny
import ftlab
from ftlab import cli
from ftlab.core.batches import collate
from ftlab.core.labels import match_labels, numbered
from ftlab.core.loading import load
from ftlab.core.model import notes_of, position_table, row_limit
from ftlab.core.scorers import label_accuracy
from ftlab.core.tokens import encode
from ftlab.instruments.bench import Base, Bench
from ftlab.lab.models import lab_tokenizer
from ftlab.trainers.fit import check_fits
from ftlab.trainers.stage import lost_to_rounding

TOK = lab_tokenizer()
# Sorted, for a vocabulary has no order; lower-case, for two spellings of a word may be one token
WORDS = sorted(w for w in TOK.get_vocab() if w.isalpha() and w.islower() and len(w) > 1)[:40]
MORE = dict(vocab_size=len(TOK), pad_token_id=TOK.pad_token_id, bos_token_id=TOK.bos_token_id,
            eos_token_id=TOK.eos_token_id)

def save(model, folder, tok=TOK, **config):
    for k, v in config.items():
        setattr(model.config, k, v)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder

def texts(n=40, labels=('neg', 'pos')):
    return [dict(text=f'{WORDS[i % 7]} {WORDS[i % 11]}', label=labels[i % len(labels)])
            for i in range(n)]

def prompts(n=40):
    return ftlab.data([dict(prompt=f'{WORDS[i % 7]} {WORDS[i % 11]} =', response=WORDS[i % 5])
                       for i in range(n)])

# ---- as before; the last digits depend on the processor

PINNED = {
    'full': ('0x1.c365820000000p-12', '-0x1.872c0d4b40000p-2'),
    'lora(r=4)': ('0x1.05e47e0000000p-12', '-0x1.672839e214000p-2'),
    'lift': ('0x1.3305fe0000000p-11', '-0x1.d2c06e1900000p-1')}

def ends(run):
    moved = sum(v.double().sum() for v in run.delta.tensors().values())
    return run.log[-1]['loss'], float(moved)

def near(loss, moved):
    return (pytest.approx(float.fromhex(loss), rel=5e-5),
            pytest.approx(float.fromhex(moved), rel=2e-3))

@pytest.mark.parametrize('name', PINNED)
def test_a_lab_model_trains_as_before(name):
    run = ftlab.fit(*load('lab-s'), ftlab.data('sort', n=64), ftlab.methods.get(name), steps=3,
                    batch_size=8, progress=False)
    assert (run.settings['data'], run.settings['encoded'], run.settings['model']) == (
        'a60463a2c5ff8e36', '05f66ad3c3fdaef0', '0e8b60bcc972ca9c')
    assert ends(run) == near(*PINNED[name])

def test_a_new_head_trains_as_before():
    d = ftlab.data([dict(text=f'w {i % 7} x', label='b' if i % 2 else 'a') for i in range(60)])
    run = ftlab.fit(*load('lab-e', labels=d.labels, seed=1), d, steps=3, batch_size=8,
                    progress=False)
    assert ends(run) == near('0x1.a378540000000p-1', '-0x1.96cb7b90c3000p-2')
    assert run.settings['model'] == 'b28c4f0baa970c24' and numbered(d, run.model) is d
    if T.__version__ == '5.23.0':  # the configuration, and so the fingerprint, names the version
        assert Base('lab-s').fingerprint(0) == '5280385e65bafede3f1f'
        assert Base('lab-e', labels=d.labels).fingerprint(1) == '7a566a371106dea6c421'

# ---- labels

CLASSIFIERS = ('bert', 'roberta', 'gpt2', 'llama', 'qwen2', 'gemma', 'opt', 'phi')
NAMES = ('negative', 'neutral', 'positive')

def classifier(family, folder, names, seed=0):
    model = tiny(family, 'classifier', seed, **MORE, num_labels=len(names))
    return save(model, folder, id2label=dict(enumerate(names)),
                label2id={n: i for i, n in enumerate(names)})

@pytest.mark.parametrize('family', CLASSIFIERS)
def test_a_head_that_knows_the_labels_is_kept_in_any_order(family, tmp_path):
    for i, order in enumerate(itertools.permutations(NAMES)):
        folder = classifier(family, tmp_path/str(i), order)
        spell = (str, str.upper, lambda s: f' {s.title()} ')[i % 3]
        d = ftlab.data(texts(60, [spell(n) for n in NAMES]))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            model, tok = load(folder, labels=d.labels, seed=5)
        stored, own = load_file(folder/'model.safetensors'), model.state_dict()
        assert all(torch.equal(own[k], v) for k, v in stored.items())
        assert list(model.config.id2label.values()) == list(order)
        n = numbered(d, model)
        plain = [[order[r['label']] for r in part] for part in (n.train, n.validation, n.test)]
        assert plain == [[d.labels[r['label']].strip().lower() for r in part]
                         for part in (d.train, d.validation, d.test)]
        assert n is d or 'numbered as in the model' in n.note
        assert label_accuracy(model, tok, d.test,
                              d.labels) == label_accuracy(model, tok, n.test, n.labels)

def right(folder, rows):
    "What a user of the folder gets with transformers alone, by its own id2label"
    m = T.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    said = [m.config.id2label[int(m(**TOK(r['text'], return_tensors='pt')).logits.argmax())]
            for r in rows]
    return sum(s == r['label'] for s, r in zip(said, rows))/len(rows)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A classifier that is right in all rows, numbered against the alphabet, and its rows"
    root, rows = tmp_path_factory.mktemp('trained'), texts(200, ('positive', 'negative'))
    for i, row in enumerate(rows):
        row['text'] = f'{WORDS[i % 2]} {WORDS[i % 31]} {WORDS[i % 37]}'
    d = ftlab.data(rows)
    assert d.labels == ['negative', 'positive']
    model, tok = load(classifier('bert', root/'m', ('positive', 'negative')))
    run = ftlab.fit(model, tok, d, steps=40, lr=1e-2, batch_size=8, progress=False)
    assert run.data.labels == ['positive', 'negative'] and any('numbered' in n for n in run.notes)
    (root/'d.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return run.export(root/'trained'), root/'d.jsonl', rows[:40]

def test_fit_and_compare_use_the_models_numbers(trained, tmp_path):
    folder, file, rows = trained
    d = ftlab.data(file)
    assert right(folder, rows) == 1. and label_accuracy(*load(folder), d.test, d.labels) == 1.
    for model in (str(folder), load(folder)):
        c = ftlab.compare(['full'], model, file, seeds=1, steps=2, batch_size=4, tune=False,
                          old=rows,
                          out=tmp_path/f'c{isinstance(model, str)}', progress=False).json()
        seed = c['methods'][0]['seeds'][0]
        assert seed['before'] == 1. and seed['old']['rows']['before'] == 1.
        assert any('numbered' in n for n in c['protocol']['notes'])

def test_the_command_line_uses_the_models_numbers(trained, tmp_path, capsys):
    folder, file, rows = trained
    shared, out = ['--model', str(folder), '--data', str(file)], str(tmp_path/'run')
    assert cli.main(['fit', *shared, '--steps', '3', '--lr', '1e-4', '--out', out, '--seed',
                     '3']) == 0
    assert 'accuracy on test rows 1.000 -> 1.000' in (said := capsys.readouterr().out) and 'note: labels' in said
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert record['labels'] == ['positive', 'negative'] and any('numbered' in n for n in record['notes'])
    assert cli.main(['report', out, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['notes'] == record['notes']
    assert cli.main(['merge', out, '--out', str(tmp_path/'merged')]) == 0 and right(tmp_path/'merged', rows) == 1.
    assert cli.main(['doctor', out, '--exported', str(tmp_path/'merged')]) == 0
    assert cli.main(['compare', *shared, '--methods', 'full', '--dry-run']) == 0

def test_labels_that_are_only_partly_the_models_are_refused(tmp_path):
    folder = classifier('bert', tmp_path/'m', NAMES)
    for labels, says in ((['negative', 'positive'], 'the model has neutral'),
                         ([*NAMES, 'mixed'], 'the data have mixed'),
                         (['negative', 'mixed', 'positive'], 'the data have mixed.*the model has neutral')):
        with pytest.raises(ValueError, match=says + ".*head='new'"):
            load(folder, labels=labels)
        new, _ = load(folder, labels=labels, head='new')
        assert list(new.config.id2label.values()) == labels
        assert any('trained head for negative, neutral, positive was replaced' in n
                   for n in notes_of(new))
        d = ftlab.data(texts(40, labels))
        with pytest.raises(ValueError, match="only partly those of the model" if len(labels) == 3
                           else '3'):
            ftlab.fit(*load(folder), d, steps=1, progress=False)

def test_other_labels_replace_the_head_and_say_so(tmp_path):
    folder = classifier('bert', tmp_path/'m', ('ham', 'spam'))
    d = ftlab.data(texts(40))
    with pytest.warns(UserWarning, match='trained head for ham, spam was replaced .* for neg, pos'):
        model, tok = load(folder, labels=d.labels)
    run = ftlab.fit(model, tok, d, steps=1, batch_size=4, progress=False)
    assert any('trained head for ham, spam was replaced' in n for n in run.notes)
    with pytest.raises(ValueError, match='has a head for ham, spam, and the data have the labels neg, pos.*labels='):
        ftlab.fit(*load(folder), d, steps=1, progress=False)
    exact, _ = load(folder, labels=['spam', 'ham'], head='exact')
    assert list(exact.config.id2label.values()) == ['spam', 'ham']
    with pytest.raises(ValueError, match='head is .old.; it must be auto, new, exact'):
        load(folder, labels=d.labels, head='old')

@pytest.mark.parametrize('names', [('LABEL_0', 'LABEL_1', 'LABEL_2'), NAMES])
def test_numbers_are_the_models_numbers(names, tmp_path):
    import datasets
    folder = classifier('bert', tmp_path/'m', names)
    stored = load_file(folder/'model.safetensors')['classifier.weight']
    d = ftlab.data(texts(60, (0, 1, 2)))
    model, tok = load(folder, labels=d.labels)
    assert torch.equal(model.classifier.weight, stored) and numbered(d, model) is d
    features = datasets.Features(text=datasets.Value('string'),
                                 label=datasets.ClassLabel(names=list(NAMES[::-1])))
    e = ftlab.data(datasets.Dataset.from_list(texts(60, (0, 1, 2)), features=features))
    assert e.labels == list(NAMES[::-1])
    if names == NAMES:
        n = numbered(e, load(folder, labels=e.labels)[0])
        assert [NAMES[r['label']] for r in n.train] == [e.labels[r['label']] for r in e.train]
    else: # the file does not say what its numbers mean
        with pytest.warns(UserWarning, match='head for LABEL_0, LABEL_1, LABEL_2 was replaced'):
            load(folder, labels=e.labels)
        run = ftlab.fit(*load(folder), e, steps=1, batch_size=4, progress=False)
        assert list(run.model.config.id2label.values()) == e.labels

def test_names_match_or_they_do_not():
    g = torch.Generator().manual_seed(0)
    for n in range(2, 8):
        own = [f'Name {i}' for i in range(n)]
        order = torch.randperm(n, generator=g).tolist()
        assert match_labels(own, [f'  nAme   {i}' for i in order]) == order
        assert match_labels(own, [str(i) for i in order]) == order
        assert match_labels(own, [f'other {i}' for i in order]) is None
        for k in range(1, n):
            with pytest.raises(ValueError, match='only partly'):
                match_labels(own, [f'name {i}' for i in order[:k]])
    assert match_labels(['US', 'us'], ['us', 'US']) == [1, 0] # case counts where it must

# ---- what the files lack, and what is left over

FAMILIES = [*DECODERS, *PLAIN, *ENCODERS]

@pytest.mark.parametrize('family', FAMILIES)
def test_every_tensor_is_from_the_files_or_named(family, tmp_path):
    kinds = dict(classifier='label', none='encoder', causal='causal', masked='masked')
    heads = [h for h in ('classifier', 'none', USUAL[family])]
    for head in heads:
        save(tiny(family, head, **MORE), tmp_path/head)
    for head, kind in itertools.product(heads, [None, *(kinds[h] for h in heads)]):
        how = dict(labels=['yes', 'no']) if kind is None else dict(kind=kind)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                model, _ = load(tmp_path/head, **how)
        except ValueError as e:
            assert 'lack' in str(e) and 'labels= for a new head' in str(e)
            continue
        stored = load_file(tmp_path/head/'model.safetensors')
        known = {t.numpy().tobytes() for t in stored.values()}
        said = ' '.join(notes_of(model))
        new = set(ftlab.core.loading.head_names(model)) if kind is None else set()
        lost = [n for n, p in model.named_parameters() if p.detach().numpy().tobytes() not in known
                and n not in new]
        assert all('pooler' in n for n in lost) and (not lost or 'random values' in said)
        used = {p.detach().numpy().tobytes() for p in model.state_dict().values()}
        unused = [n for n, t in stored.items() if t.numpy().tobytes() not in used]
        assert not unused or f'({len(unused)})' in said or 'trained head' in said

# ---- padding

@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral', 'gemma', 'opt', 'phi', 'bert'])
@pytest.mark.parametrize('pads', itertools.product((None, 0, 3), (None, 0, 3), (True, False)))
def test_one_padding_token(family, pads, tmp_path):
    "A row gets the same logits alone and beside a longer one, whatever the files say"
    in_config, in_settings, in_tokenizer = pads
    model = tiny(family, 'causal' if family != 'bert' else 'masked', **MORE)
    special = dict(pad_token='<pad>') if in_tokenizer else {}
    tok = T.PreTrainedTokenizerFast(tokenizer_object=TOK.backend_tokenizer, eos_token='<eos>',
                                    bos_token='<bos>', unk_token='<unk>', **special)
    if in_settings is not None and family != 'bert':
        model.generation_config.pad_token_id = in_settings
    save(model, tmp_path/'m', tok, pad_token_id=in_config)
    m, t = load(tmp_path/'m', labels=['a', 'b'])
    assert t.pad_token_id is not None and m.config.pad_token_id == t.pad_token_id
    rows = [encode(dict(text=' '.join(WORDS[:n]), label=0), t, 'label') for n in (3, 12)]
    ask = lambda rs: m(**{k: v for k, v in collate(rs, t.pad_token_id).items()
                          if k != 'labels'}).logits[0]
    assert torch.allclose(ask(rows[:1]), ask(rows), atol=1e-5)
    if family != 'bert':
        lm, t = load(tmp_path/'m')
        assert lm.generation_config.pad_token_id == t.pad_token_id
        assert lm.config.pad_token_id in ((None,) if in_config is None else (t.pad_token_id,))

# ---- length

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4,
             max_position_embeddings=40, n_positions=40, max_seq_len=40, d_model=32, n_layer=2,
             n_head=4,
             n_layers=2, n_heads=4, n_embd=32, pad_token_id=1, bos_token_id=0, eos_token_id=2,
             ffn_dim=48,
             rotary_dim=8, embedding_size=32, word_embed_proj_dim=32, attention_window=8)
LENGTHS = dict(causal='gpt2 gptj gpt_neo gpt_bigcode codegen opt openai-gpt ctrl mpt xglm bloom falcon llama mamba phi',
               masked='bert roberta xlm-roberta camembert mpnet distilbert albert electra ibert nystromformer '
                      'roberta-prelayernorm data2vec-text deberta deberta-v2 mobilebert squeezebert megatron-bert')
EXTRA = dict(gpt_neo=dict(num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]]))
ABSURD = (int(1e30), 1e30, None, 0, -1, float('nan'))

@pytest.mark.parametrize('kind, name',
                         [(k, n) for k, names in LENGTHS.items() for n in names.split()])
def test_a_row_as_long_as_the_limit_can_be_read(kind, name):
    if name == 'mobilebert':
        pytest.skip('its sizes follow rules of their own')
    config = T.AutoConfig.for_model(name, **SIZES | EXTRA.get(name, {}))
    with torch.random.fork_rng(), torch.no_grad():
        model = HEADS[kind].from_config(config).eval()
        read = lambda n: model(input_ids=torch.full((1, n), 5),
                               attention_mask=torch.ones(1, n, dtype=torch.long))
        class Said:
            model_max_length = int(1e30)
        limit = row_limit(model, Said())
        for said in ABSURD:
            Said.model_max_length = said
            assert row_limit(model, Said()) == limit
        Said.model_max_length = 12.
        assert row_limit(model, Said()) == 12
        read(limit)
        read(asked := row_limit(model, Said(), limit + 30))
        if table := position_table(model):
            assert asked == limit == table
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                read(table + 1)

def test_what_is_cut_is_counted(tmp_path, capsys):
    rows = [dict(prompt='a '*(30 if i % 10 < 4 else 3) + f'{WORDS[i % 37]} {i % 9} =', response='b')
            for i in range(150)]
    labelled = [dict(text='a '*(30 if i % 2 else 3) + f'{WORDS[i % 37]}', label=i % 3 % 2)
                for i in range(60)]
    save(tiny('gpt2', 'causal', **MORE | dict(max_position_embeddings=16)), tmp_path/'m')
    save(tiny('roberta', 'none', **MORE | dict(max_position_embeddings=16)), tmp_path/'e')
    d = ftlab.data(rows)
    run = ftlab.fit(*load(tmp_path/'m'), d, steps=1, batch_size=4, progress=False)
    long = sum(len(r['prompt'].split()) > 30 for r in d.train)
    assert any(f'{long} of {len(d.train)} training rows are left out' in n for n in run.notes)
    e = ftlab.data(labelled)
    run = ftlab.fit(*load(tmp_path/'e', labels=e.labels), e, steps=1, batch_size=4, progress=False)
    long = sum(len(r['text'].split()) > 30 for r in e.train)
    assert any(f'{long} of {len(e.train)} training rows are cut to' in n for n in run.notes)
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    shared = ['--model', str(tmp_path/'m'), '--data', str(tmp_path/'d.jsonl'), '--steps', '1', '--batch-size', '4']
    assert cli.main(['fit', *shared, '--out', str(tmp_path/'run')]) == 0
    assert 'test rows are left out' in capsys.readouterr().out
    assert cli.main(['compare', *shared, '--methods', 'full', '--seeds', '1', '--no-tune',
                     '--out', str(tmp_path/'c')]) == 0
    assert 'test rows are left out' in (tmp_path/'c'/'index.html').read_text()

# ---- tokens without a row

def test_tokens_that_the_embedding_has_no_row_for(tmp_path, capsys):
    tok = lab_tokenizer()
    tok.add_tokens(['[tool]', '[end]'])
    for family in ('llama', 'gpt2', 'opt'):
        folder = save(tiny(family, 'causal', **MORE), tmp_path/family, tok)
        model, t = load(folder)
        assert any('no row for 2 tokens' in n for n in notes_of(model))
        run = ftlab.fit(model, t, prompts(), steps=1, batch_size=4, progress=False) # they are not used
        assert run.log
        rows = [dict(prompt=f'{WORDS[i % 7]} {WORDS[i % 5]} =',
                     response=f'[tool] {WORDS[i % 3]}') for i in range(40)]
        for ask in (lambda: ftlab.fit(*load(folder), ftlab.data(rows), steps=1, progress=False),
                    lambda: Bench(str(folder), ftlab.data(rows)),
                    lambda: check_fits(*load(folder), ftlab.data(rows))):
            with pytest.raises(ValueError, match=r"there is none for '\[tool\]'.*resize=True"):
                ask()
        wide, t = load(folder, resize=True)
        of = lambda m: m.get_input_embeddings().weight
        assert torch.equal(of(wide), of(load(folder, resize=True)[0]))
        assert torch.equal(of(wide)[:len(of(model))], of(load(folder)[0]))
        run = ftlab.fit(wide, t, ftlab.data(rows), steps=1, batch_size=4, progress=False)
        assert any('2 tokens' in n for n in run.notes) and run.export(tmp_path/f'{family}-wide')
        assert not notes_of(load(tmp_path/f'{family}-wide')[0])
    (tmp_path/'d.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert cli.main(['fit', '--model', str(tmp_path/'llama'), '--data', str(tmp_path/'d.jsonl'),
                     '--out', str(tmp_path/'r')]) == 1
    assert 'python -c' in capsys.readouterr().err
    tok.pad_token = '[end]'
    with pytest.raises(ValueError, match=r"cannot pad.*none for '\[end\]'"):
        load(save(tiny('llama', 'causal', **MORE), tmp_path/'pad', tok))

# ---- half precision

@pytest.mark.parametrize('name', ['lora', 'lora(rs=True)', 'lift', 'randlora(r=8)', 'lofit', 'difffit', 'lt_sft',
                                  'hft'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_adapters_are_in_float32_whatever_the_model_is_in(name, dtype, tmp_path):
    folder = save(tiny('llama', 'causal', **MORE), tmp_path/'m')
    model, tok = load(folder, dtype=dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        recipe = ftlab.methods.get(name)
    except (KeyError, ValueError) as e:
        pytest.skip(str(e)[:80])
    run = ftlab.fit(model, tok, prompts(), recipe, steps=3, batch_size=4, lr=1e-2, progress=False,
                    precision='pure_bf16')
    att = run.delta.attached
    own = {n: p for n, p in att.parameters().items() if '::' in n}
    assert all(p.dtype == torch.float32 for p in own.values())
    assert all(b.dtype == a.dtype for _, b, a in att.weights())
    run.delta.save(tmp_path/'delta.safetensors')
    here = model(input_ids=torch.arange(4, 9)[None]).logits
    with run.disabled():
        assert all(torch.equal(p, before[n])
                   for n, p in ftlab.adapters.attach.own_weights(model).items())
    again, _ = load(folder, dtype=dtype)
    ftlab.load_delta(again, tmp_path/'delta.safetensors')
    assert torch.equal(again(input_ids=torch.arange(4, 9)[None]).logits, here)
    if all(d.site == 'weight' for d in att.deltas.values()):
        out = run.export(tmp_path/'out')
        assert {t.dtype for t in load_file(out/'model.safetensors').values()} == {
            getattr(torch, dtype)}

def test_a_bfloat16_model_learns_through_lora_as_a_float32_model_does(tmp_path):
    folder = save(tiny('llama', 'causal', **MORE).bfloat16(), tmp_path/'m')
    runs = [ftlab.fit(*load(folder, dtype=dtype), prompts(), ftlab.methods.lora(r=2), steps=20,
                      lr=1e-4,
                      batch_size=4, progress=False) for dtype in ('bfloat16', 'float32')]
    a, b = ([p for n, p in r.delta.attached.parameters().items() if n.endswith('::B')]
            for r in runs)
    assert all(bool((x != 0).all()) for x in a)
    for x, y in zip(a, b):
        assert torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0) > .95

def test_a_delta_of_version_0_1_in_bfloat16_is_still_loaded(tmp_path):
    from ftlab.adapters.store import pack, save_delta
    folder = save(tiny('llama', 'causal', **MORE).bfloat16(), tmp_path/'m')
    run = ftlab.fit(*load(folder), prompts(), ftlab.methods.lora(r=2), steps=3, lr=1e-2,
                    batch_size=4, progress=False)
    tensors, kinds = pack(run.delta.attached)
    old = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    save_delta(tmp_path/'old.safetensors', old, kinds, run.delta.base)
    att = ftlab.load_delta(load(folder)[0], tmp_path/'old.safetensors')
    assert all(torch.equal(d.A, old[f'{n}::A'].float()) for n, d in att.deltas.items())

def test_rates_that_round_away_are_refused_unless_asked_for(tmp_path):
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**MORE, hidden_size=64, intermediate_size=128,
                                             num_hidden_layers=2,
                                             num_attention_heads=4, max_position_embeddings=64))
    folder, moved = save(model.bfloat16(), tmp_path/'m'), {}
    for lr in (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3):
        lost = lost_to_rounding(list(load(folder)[0].parameters()), lr)
        ask = lambda **more: ftlab.fit(*load(folder), prompts(), steps=10, lr=lr, batch_size=8,
                                       progress=False, **more)
        if lost > .5:
            with pytest.raises(ValueError, match="rounding undoes a step for .*dtype='float32'.*pure_bf16"):
                ask()
            run = ask(precision='pure_bf16')
        else:
            run = ask()
        change = {n: v for n, v in run.delta.tensors().items() if 'proj' in n}
        moved[lr] = sum(int((v != 0).sum())
                        for v in change.values())/sum(v.numel() for v in change.values())
        assert abs(moved[lr] - (1 - lost)) < .25
        assert lost_to_rounding([p.float() for p in model.parameters()], lr) is None
    assert moved[1e-6] < .05 and moved[1e-5] < .3 and moved[1e-3] > .95
    ftlab.fit(*load(folder, dtype='float32'), prompts(), steps=1, lr=1e-6, batch_size=4,
              progress=False,
              precision='bf16')
    with pytest.raises(ValueError, match='precision'):
        ftlab.fit(*load(folder), prompts(), steps=1, precision='pure')

@pytest.mark.parametrize('name', ['full', 'lora', 'lift', 'hft'])
def test_the_doctor_has_no_false_alarm_on_bfloat16(name, tmp_path):
    folder = save(tiny('llama', 'causal', **MORE).bfloat16(), tmp_path/'m')
    recipe, lr = ftlab.methods.get(name), None if name in ('lora', 'lift') else 1e-3
    how = dict(steps=25, batch_size=8, lr=lr)
    before = ftlab.doctor(*load(folder), prompts(300), recipe, **how)
    run = ftlab.fit(*load(folder), prompts(300), recipe, progress=False,
                    precision='pure_bf16', **how)
    after = ftlab.doctor(run)
    assert not [f for f in (*before, *after) if f.severity == 'error'], [
        f.seen for f in (*before, *after)]

# ---- models that read more than text

def test_the_text_part_is_loaded_alone(tmp_path):
    text = dict(vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    eyes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                image_size=28,
                patch_size=14)
    pixtral = T.Mistral3Config(text_config=T.MistralConfig(**text),
                               vision_config=T.PixtralVisionConfig(**eyes))
    torch.manual_seed(0)
    made = dict(
        gemma3=T.Gemma3ForConditionalGeneration(T.Gemma3Config(
            text_config=text, vision_config=eyes, image_token_index=3, mm_tokens_per_image=4)),
        llava=T.LlavaForConditionalGeneration(T.LlavaConfig(text_config=T.LlamaConfig(**text),
                                                            vision_config=T.CLIPVisionConfig(
                                                                **eyes))),
        mistral3=T.Mistral3ForConditionalGeneration(pixtral))
    ids = torch.arange(5, 12)[None]
    for name, whole in made.items():
        folder = save(whole.eval(), tmp_path/name)
        model, tok = load(folder)
        assert (type(model).__name__.endswith('ForCausalLM')
                and 'Conditional' not in type(model).__name__)
        assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5)
        assert any('only the text part' in n for n in notes_of(model))
        run = ftlab.fit(model, tok, prompts(), ftlab.methods.lora(r=2), steps=1, batch_size=4,
                        progress=False)
        out = run.export(tmp_path/f'{name}-out')
        assert not [n for n in notes_of(load(out)[0]) if 'part' in n]
        new, _ = load(folder, labels=['a', 'b'])
        assert new.config.num_labels == 2
    config = T.Qwen2VLConfig(text_config=dict(text,
                                              rope_parameters=dict(rope_type='default',
                                                                   mrope_section=[1, 1, 2])),
                             vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2))
    folder = save(T.Qwen2VLForConditionalGeneration(config), tmp_path/'qwen')
    with pytest.raises(ValueError, match='Qwen2VLForConditionalGeneration, whose text part .* cannot load alone'):
        load(folder)

# ---- what fit does not train, and layouts without a row

def test_encoder_decoders_are_refused_before_anything_is_scored(tmp_path, monkeypatch, capsys):
    sizes = dict(vocab_size=len(TOK), d_model=32, pad_token_id=TOK.pad_token_id,
                 eos_token_id=TOK.eos_token_id,
                 decoder_start_token_id=TOK.pad_token_id)
    bart = dict(encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2)
    made = dict(t5=T.T5ForConditionalGeneration(T.T5Config(**sizes, d_kv=8, d_ff=48, num_layers=1,
                                                           num_heads=2)),
                bart=T.BartForConditionalGeneration(T.BartConfig(**sizes, **bart)),
                marian=T.MarianMTModel(T.MarianConfig(**sizes, **bart)),
                label=T.BartForSequenceClassification(T.BartConfig(**sizes, **bart)))
    (tmp_path/'d.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'{i} =', response='a'))
                                              for i in range(200)))
    (tmp_path/'l.jsonl').write_text('\n'.join(json.dumps(r) for r in texts(60, ('LABEL_0', 'LABEL_1', 'LABEL_2'))))
    monkeypatch.setattr('ftlab.instruments.bench.scores', lambda *a, **k: pytest.fail('it was scored'))
    for name, model in made.items():
        save(model, tmp_path/name)
        data = tmp_path/('l.jsonl' if name == 'label' else 'd.jsonl')
        for command in (['fit'], ['compare', '--methods', 'full', '--seeds', '1', '--no-tune']):
            asked = [*command, '--model', str(tmp_path/name), '--data', str(data), '--steps', '1',
                     '--out', str(tmp_path/f'{name}-{command[0]}')]
            assert cli.main(asked) == 1, name
            said = capsys.readouterr().err
            assert 'is an encoder-decoder model' in said, (name, said)

LAYOUTS = 'falcon bloom mpt mamba gpt_neo starcoder2 stablelm olmo2 cohere granite'.split()

@pytest.mark.parametrize('name', LAYOUTS)
def test_a_layout_without_a_row_names_a_way_out_that_works(name):
    import re
    more = dict(vocab_size=len(TOK), num_local_experts=2, num_experts=2, moe_intermediate_size=16,
                num_key_value_heads=2, shared_expert_intermediate_size=16, num_experts_per_tok=1)
    config = T.AutoConfig.for_model(name, **SIZES | more | EXTRA.get(name, {}))
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match='no row for model type') as e:
        ftlab.fit(model, TOK, prompts(), ftlab.methods.lora(), steps=1, progress=False)
    pattern = re.search(r"lora\(targets=r'(.*?)'\)", str(e.value))[1]
    run = ftlab.fit(model, TOK, prompts(), ftlab.methods.lora(targets=pattern), steps=1,
                    batch_size=4, progress=False)
    chosen = run.delta.attached.deltas
    assert len(chosen) >= 4 and not any('router' in n or 'lm_head' in n for n in chosen)
    run.delta.attached.detach()
    fused = [n for n, p in model.named_parameters() if p.ndim > 2 and 'expert' in n]
    if fused:
        with pytest.raises(ValueError, match=f'{fused[0]}.* is a stack of 2 tensors .*fused experts'):
            ftlab.fit(model, TOK, prompts(), ftlab.methods.lora(targets='experts'), steps=1,
                      progress=False)

def test_an_adapter_of_peft_is_merged(tmp_path, capsys):
    peft = pytest.importorskip('peft')
    base = save(tiny('llama', 'causal', **MORE), tmp_path/'base')
    model = peft.get_peft_model(T.AutoModelForCausalLM.from_pretrained(base),
                                peft.LoraConfig(r=2, target_modules=['q_proj'],
                                                init_lora_weights=False))
    model.save_pretrained(tmp_path/'adapter')
    assert cli.main(['merge', str(tmp_path/'adapter'), '--out', str(tmp_path/'x')]) == 1
    assert str(base) in capsys.readouterr().err
    assert cli.main(['merge', str(tmp_path/'adapter'), '--model', str(base), '--out', str(tmp_path/'x')]) == 0
    ids = torch.arange(5, 12)[None]
    assert torch.allclose(load(tmp_path/'x')[0](ids).logits, model.eval()(ids).logits, atol=1e-5)

def test_an_export_that_is_not_whole_is_not_written(tmp_path, monkeypatch):
    run = ftlab.fit(*load(save(tiny('llama', 'causal', **MORE), tmp_path/'m')), prompts(), steps=1,
                    batch_size=4,
                    progress=False)
    full = T.PreTrainedModel.save_pretrained
    def some(self, folder, state_dict=None, **more):
        return full(self, folder, state_dict=dict(list(state_dict.items())[:5]), **more)
    with monkeypatch.context() as m:
        m.setattr(T.PreTrainedModel, 'save_pretrained', some)
        with pytest.raises(RuntimeError, match='would hold .* values; nothing was written'):
            run.export(tmp_path/'out')
    with monkeypatch.context() as m:
        m.setattr(type(run.tok), 'save_pretrained', lambda *a, **k: None)
        with pytest.raises(RuntimeError, match='no tokenizer'):
            run.export(tmp_path/'out')
    assert not (tmp_path/'out').exists() and run.export(tmp_path/'out')
