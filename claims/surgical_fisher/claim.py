"""lab-e, an encoder, learns three tasks with labels, each by one of its four blocks alone, under a fresh pooler
and classifier: the block with the most Fisher information, the one with the least, or each in turn"""
from functools import lru_cache
import ftlab
from ftlab.adapters.subsets.surgical_fisher import informative_blocks
from ftlab.core.anatomy import anatomy
from ftlab.core.batches import Sample
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, label_hits
from ftlab.core.tokens import encode_all
from ftlab.lab.world import ATTRIBUTES

# the skill whose questions are asked, at which level; which of them; the label
TASKS = dict(
    note=('context', 1, lambda a: a in ATTRIBUTES['color'], lambda a: a),  # a colour, from a note
    biggest=('max', None, lambda a: a not in 'abc', lambda a: a),          # the last in the alphabet
    second=('reverse', None, lambda a: True, lambda a: a.split()[1]))      # the last letter but one
BLOCKS, BATCH, STEPS, ASKED = range(4), 16, 60, 334
EACH = {f'block{b}': (b,) for b in BLOCKS}
# blocks that train, whatever the task
ALONE = dict(EACH, full=tuple(BLOCKS), full_half=tuple(BLOCKS), head=(), outside=())
EVERYTHING = ('full', 'full_half', 'outside') # the embedding trains, too

@lru_cache(64)
def rows(task, n, split, seed):
    "Different questions of one task with their labels"
    skill, level, wanted, label = TASKS[task]
    out = {}
    for r in WORLD.stream(skill, split, seed, level):
        if wanted(r['response']):
            out[r['prompt']] = label(r['response'])
        if len(out) == n:
            return [dict(text=t, label=v) for t, v in out.items()]

def data_of(task, seed, split, steps):
    asked = rows(task, ASKED, split, seed)
    # of the full run: in a short one a rare label can be missing, and the heads would differ in size
    labels = sorted({r['label'] for r in rows(task, BATCH*STEPS, 'train', seed)})
    return ftlab.data(rows(task, BATCH*steps, 'train', seed), validation=asked, test=asked,
                      labels=labels)

def parts(blocks, embedding):
    "Select some blocks, the pooler (fresh in lab-e), and if asked the embedding; the classifier always trains"
    def select(model, batches=None, seed=0):
        at = anatomy(model).location
        chosen = lambda n: (at(n)[0] in blocks or '.pooler.' in n
                            or embedding and '.embeddings.' in n)
        return {n: True for n, _ in model.named_parameters() if chosen(n)}

    return Recipe('parts', select=select)

@lru_cache(1024)
def hits(task, blocks, embedding, rate, seed, split, steps):
    "Right or wrong on each question, after training these parts"
    data = data_of(task, seed, split, steps)
    model, tok = ftlab.load('lab-e', labels=data.labels, seed=seed)
    ftlab.fit(model, tok, data, parts(blocks, embedding), steps=steps, batch_size=BATCH, lr=rate,
              seed=seed, progress=False)
    return label_hits(model, tok, data.test)

@lru_cache(256)
def chosen(task, by, seed, split, steps):
    "The block with the most or the least Fisher information on 100 training rows, under the fresh head"
    data = data_of(task, seed, split, steps)
    model, tok = ftlab.load('lab-e', labels=data.labels, seed=seed)
    sample = Sample(encode_all(data.train, tok, 'label'), tok.pad_token_id, seed=seed)
    names = informative_blocks(1/len(BLOCKS), by, outside=False)(model, sample, seed)
    block, = {anatomy(model).location(n)[0] for n in names}
    return block

def run(arm, rate, seed, split, steps):
    blocks = {t: ALONE[arm] if arm in ALONE else (chosen(t, arm, seed, split, steps),)
              for t in TASKS}
    by_task = {t: sum(hits(t, blocks[t], arm in EVERYTHING, rate, seed, split, steps))/ASKED
               for t in TASKS}
    return dict(by_task, score=sum(by_task.values())/len(TASKS), questions=ASKED*len(TASKS),
                blocks={t: list(b) for t, b in blocks.items()})

def derive(found):
    """A random block: the mean over all four, each at its own rate. And the better of two ways that
    choose nothing: half of the steps, and no block at all"""
    out = {}
    if all(a in found for a in EACH):
        out['random'] = {k: sum(found[a][k] for a in EACH)/len(EACH) for k in (*TASKS, 'score')}
    if {'full_half', 'head'} <= set(found):
        out['simple'] = dict(score=max(found[a]['score'] for a in ('full_half', 'head')))
    return out

def identities():
    model, tok = ftlab.load('lab-e', labels=['a', 'b'], seed=0)
    sizes = [sum(model.get_parameter(n).numel() for n in parts((b,), False).select(model)
                 if '.pooler.' not in n) for b in BLOCKS]
    every = set(parts(BLOCKS, True).select(model))
    most, least = (chosen('note', by, 0, 'validation', 20) for by in ('fisher', 'bottom'))
    texts = [{r['text'] for r in rows(t, ASKED, s, 0)}
             for t in TASKS for s in ('train', 'validation', 'test')]
    return {'blocks have equal sizes': len(set(sizes)) == 1,
            'full fine-tuning trains all but the classifier, which trains anyway':
                every == {n for n, _ in model.named_parameters() if not n.startswith('classifier')},
            'the blocks with the most and the least information are two': most != least,
            'no question is taught, or asked in two splits':
                sum(map(len, texts)) == len(set.union(*texts))}
