"""The main job as the README tells it: a reader's own JSONL on a model that nobody here trained,
by the README's own lines"""
import json, re
from pathlib import Path
import pytest, torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n"
          "' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
          "'<|im_start|>assistant\n' }}{% endif %}")

@pytest.fixture
def reader(tmp_path, monkeypatch):
    "A folder with a random Qwen-like model and 80 rows of a reader's own"
    colors, fruit = ('red green blue white black'.split(),
                     'apple plum pear fig lemon date melon'.split())
    rows = [dict(prompt=f'What colour is {f} number {i}?', response=f'It is {colors[(i + len(f)) % 5]}.')
            for i in range(12) for f in fruit][:80]
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([r['prompt'] + r['response'] for r in rows], vocab_size=400,
                            special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token='<|im_end|>',
                                  pad_token='<|endoftext|>', chat_template=CHATML,
                                  model_max_length=256)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                    tie_word_embeddings=True))
    model.save_pretrained(tmp_path/'model')
    tok.save_pretrained(tmp_path/'model')
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_the_readmes_lines_on_a_readers_own_data_and_model(reader):
    readme = (Path(__file__).parent.parent/'README.md').read_text()
    block = next(b for b in re.findall(r'```python\n(.*?)```', readme, re.S) if 'my.jsonl' in b)
    lines = block.replace('your/model-or-folder', 'model').replace(
        "'my.jsonl'", "'my.jsonl', steps=2, evaluate_every=2, batch_size=8, items=8, validation_items=8")
    assert lines.count('steps=2') == 1
    names = {}
    exec(lines, names)
    result = names['result'].json()
    assert ([m['name'] for m in result['methods']] == ['full', 'hft', 'lora']
            and all(len(m['seeds']) == 3 for m in result['methods']))
    assert all(s['error'] is None for m in result['methods'] for s in m['seeds'])
    assert '<html' in (reader/'comparison.html').read_text()[:200].lower()
