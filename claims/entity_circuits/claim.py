"""lab-l after 2,214 steps of pretraining, and after 100 more on boxes and moves: is the base's
circuit the tuned model's, and do its head outputs carry the gain into the base?"""
from functools import cache
import ftlab
from ftlab.evaluators.mechanisms.entity_circuits import (base_circuit, box_accuracy, box_prompts,
                                                         circuit_accuracy,
                                                         cmap_accuracy, entity_circuits)
from ftlab.evaluators.patching import all_heads, mean_activations

@cache
def circuit(seed): # the same at each rate
    return base_circuit(*ftlab.load('lab-l', revision='step-2214'), seed)

def run(arm, rate, seed, split, steps) -> dict:
    "All measures of one tuned model; the other arms are derived. The seed draws data, prompts, controls"
    masks = 60 if split == 'test' else 0 # no rate is chosen by them, and they are most of the time
    v = entity_circuits(seed, rate=rate, steps=steps, masks=masks,
                        groups=circuit(seed)).values
    gain = v['tuned.accuracy'] - v['base.accuracy']
    share = lambda cmap: (cmap - v['base.accuracy'])/gain if gain > 0 else 0.
    out = dict(accuracy=v['tuned.accuracy'], gain=gain, heads=v['base.heads'],
               faithfulness=v['tuned.faithfulness'], recovered=share(v['circuit.cmap']),
               circuit=v['tuned.circuit'], base_accuracy=v['base.accuracy'],
               base_faithfulness=v['base.faithfulness'],
               no_circuit=v['none.circuit'], all_recovered=share(v['all.cmap']),
               alone=v['alone.circuit'],
               random_faithfulness=v['random.faithfulness'],
               random_recovered=share(v['random.cmap']))
    groups = {f'recovered_{g}': share(v[f'{g}.cmap'])
              for g in ('fetcher', 'transmitter', 'detector', 'reader')}
    found = {k.replace('.', '_'): x for k, x in v.items()
             if k.endswith(('position', 'label', 'object'))}
    return out | groups | found

def derive(found) -> dict:
    "The base and the random circuits, from the same runs"
    of = found['tuned']
    base = dict(circuit=of['base_accuracy'], faithfulness=of['base_faithfulness'])
    drawn = dict(faithfulness=of['random_faithfulness'], recovered=of['random_recovered'])
    return dict(base=base, random=drawn)

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-l', revision='step-2214')
    prompts = box_prompts(tok, 8, 0, 5)
    heads = all_heads(model)
    means = mean_activations(model, [prompts.batch], heads)
    same = dict(fetcher=heads, detector=heads, reader=heads)
    return {'a circuit of all heads is the model':
                circuit_accuracy(model, prompts, same, means) == box_accuracy(model, prompts),
            'patched from itself, the base answers as before':
                cmap_accuracy(model, model, prompts, same) == box_accuracy(model, prompts)}
