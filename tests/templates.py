"Chat templates of the kinds that occur, and a tokenizer with one token a byte that can write everything"
import ast, re
from importlib.util import find_spec
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
          "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
          "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
R1 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
      "{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% else %}<|{{ m.role }}|>"
      "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n"
      "{% endif %}")
# a thinking block in the last turn only
QWEN3 = ("{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
         "{% set said = m.content %}{% if '</think>' in said %}"
         "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
         "{% set said = said.split('</think>')[-1].strip() %}{% endif %}<|im_start|>assistant\n"
         "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n"
         "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK)
# the prompt opens a thinking block that earlier turns close at once
NEMOTRON = ("{% for m in messages %}{% if m.role == 'assistant' and '<think>' not in m.content %}"
            "<|im_start|>assistant\n<think></think>{{ m.content | trim }}<|im_end|>\n{% else %}"
            + TURN + "{% endif %}{% endfor %}" + ASK.replace('assistant\n', 'assistant\n<think>\n'))
# always a thinking block, which does not parse the content
THINK = ("{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n<think>\n"
         "{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}<|im_end|>\n{% else %}" + TURN
         + "{% endif %}{% endfor %}" + ASK.replace('assistant\n', 'assistant\n<think>\n'))
PARTS = ("{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}"
         "{% if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}<|end_of_utterance|>\n"
         "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
TOOLS = ("{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
         "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
         "{% for call in m.tool_calls or () %}<tool_call>{{ call.function | tojson }}</tool_call>"
         "{% endfor %}<|im_end|>\n{% endfor %}" + ASK)
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}"
         "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
         "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
         "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
PHI3 = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
OURS = dict(
    chatml=CHATML, llama3=LLAMA3, r1=R1, qwen3=QWEN3, nemotron=NEMOTRON, think=THINK, parts=PARTS,
    tools=TOOLS, gemma=GEMMA, phi3=PHI3,
    default_system="{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
    eos_appended="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
                 "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    no_end_mark="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    no_opening="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}",
    inst="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
         "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    # other end marks in the last turn
    harmony="{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    counts="{{ messages | length }} turns\n" + CHATML,
    quoted="{% for m in messages %}{{ m | tojson }}<|end|>\n{% endfor %}"
           "{% if add_generation_prompt %}{\"role\": \"assistant\", \"content\": \"{% endif %}",
    lost_system="{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK)

def _in_package(name:str) -> dict[str, str]:
    "Return the chat templates in the Python files of a package"
    spec, out = find_spec(name), {}
    for f in sorted(Path(spec.origin).parent.rglob('*.py')) if spec else ():
        text = f.read_text(errors='ignore')
        for node in ast.walk(ast.parse(text)) if '{%' in text else ():
            s = node.value if isinstance(node, ast.Constant) else None
            loops = isinstance(s, str) and re.search(r'{%-?\s*for m.*endfor', s, re.S)
            if loops and 'Args:' not in s and '```' not in s: # no docstring
                out[f'{name}/{f.stem}:{node.lineno}'] = s
    return out

def shipped() -> dict[str, str]:
    "Return the chat templates that the installed trl and transformers contain"
    spec = find_spec('trl')
    folder = Path(spec.origin).parent/'chat_templates' if spec else None
    files = sorted(folder.glob('*.jinja')) if folder else ()
    return {f'trl/{f.stem}': f.read_text(encoding='utf-8') for f in files} | _in_package('transformers')

def byte_tokenizer(template:str|None=None, eos:str|None='</s>', pad:str='<pad>', adds:str='$A',
                   marks:bool=True):
    """Make a tokenizer with one token a byte. `adds` is what it puts around a text, as '<s> $A';
    `marks` makes each mark of the template one token."""
    found = re.findall(r'<[^<>{}\s\'"+]{1,40}>', template or '') if marks else []
    own = list(dict.fromkeys(['<s>', '</s>', '<pad>', *found]))
    vocab = {w: i for i, w in enumerate([*own, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    if adds != '$A':
        ids = [(w, vocab[w]) for w in adds.split() if w in vocab]
        t.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token=eos, pad_token=pad,
                                  extra_special_tokens=own[3:])
    tok.chat_template = template
    return tok
