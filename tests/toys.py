"Models that the lab's tokenizer fits and that train in a blink, with data for them"
from dataclasses import replace
from functools import lru_cache
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from ftlab.adapters.store import load_delta
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.tokens import encode
from ftlab.lab.models import lab_tokenizer

TOK = lab_tokenizer()

def toy(seed:int=0, hidden:int=32, dropout:float=0., tied:bool=True) -> LlamaForCausalLM:
    "A Llama of 2 blocks in eval mode, made like a lab model, but random"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=len(TOK), hidden_size=hidden, intermediate_size=5*hidden//2,
                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        max_position_embeddings=128, tie_word_embeddings=tied,
                        attention_dropout=dropout, pad_token_id=0, bos_token_id=1,
                        eos_token_id=2)).eval()

def classifier(labels:int=3, seed:int=0) -> BertForSequenceClassification:
    "A BERT of 2 blocks with a fresh head, in eval mode, without dropout"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(vocab_size=len(TOK), hidden_size=32, intermediate_size=64,
                       num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                       num_labels=labels, hidden_dropout_prob=0.,
                       attention_probs_dropout_prob=0.)).eval()

@lru_cache
def lab_data():
    "A lab skill; every fit encodes all validation rows, so there are a quarter of the usual ones"
    whole = data('new-procedure', n=200)
    return replace(whole, validation=whole.validation[:100])

@lru_cache
def label_data():
    rows = lab_data().train
    return data([dict(text=r['prompt'], label='abc'[i % 3]) for i, r in enumerate(rows)])

@lru_cache
def probe() -> dict:
    "Six validation rows, padded: the input on which outputs are compared"
    return collate([encode(r, TOK, 'text') for r in lab_data().validation[:6]], TOK.pad_token_id)

@torch.no_grad()
def logits(model, batch=None):
    "The model's logits, as it stands (the mode is not touched: a model left in training mode must show)"
    return model(**{k: v for k, v in (batch or probe()).items() if k != 'labels'}).logits.clone()

def weights(model) -> dict:
    "A copy of every parameter, under the name that it has without a change on the model"
    return {n.replace('.parametrizations.', '.').removesuffix('.original'): p.detach().clone()
            for n, p in model.named_parameters() if '.delta_' not in n
            and not ('.parametrizations.' in n and not n.endswith('.original'))}

def same(a, b) -> bool:
    "Are two dictionaries of tensors bit-equal?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_off_saved_folded(run, base, fresh, ask, path):
    """Switched off, a run's change gives the outputs `base` of `ask(model)`; saved and loaded onto
    `fresh`, and folded in, it gives its own. Returns those."""
    tuned = ask(run.model)
    with run.disabled():
        assert torch.equal(ask(run.model), base)
    run.delta.save(path)
    load_delta(fresh, path)
    assert torch.equal(ask(fresh), tuned)
    run.delta.attached.fold()
    torch.testing.assert_close(ask(run.model), tuned, atol=1e-5, rtol=0)
    return tuned


def assert_resumes(run, folder, at=1):
    """A run that is stopped after step `at` and goes on is the run that was never stopped, which is returned;
    `run(**more)` calls `fit` on a fresh model"""
    class Stop:
        def after_step(self, state):
            if state.step == at:
                raise KeyboardInterrupt
    whole, kept = run(), dict(out=folder, save_every=1)
    assert run(**kept, callbacks=(Stop(),)).interrupted
    again = run(**kept, resume=True)
    assert torch.equal(logits(again.model), logits(whole.model))
    assert same(weights(again.model), weights(whole.model)) and again.log == whole.log
    return whole

class Texts:
    "A callback that keeps the texts of the first batch of each stage"
    def __init__(self):
        self.seen = []

    def after_backward(self, state):
        if state.step == 0:
            b = state.batches[0]
            rows = zip(b['input_ids'], b['attention_mask'])
            self.seen.append([TOK.decode(i[m.bool()]) for i, m in rows])
