"""lab-l after 2,214 steps of pretraining, and after 200 more on boxes and moves: is the base's
circuit the tuned model's, and do its head outputs carry the gain into the base?"""
from functools import cache
import ftlab
from ftlab.evaluators.mechanisms.entity_circuits import (base_circuit, box_accuracy, box_prompts,
                                                         circuit_accuracy,
                                                         cmap_accuracy, entity_circuits)
from ftlab.evaluators.patching import all_heads, mean_activations

@cache
def circuit(seed): # the same at each rate; found on 33 prompts, pruned on 50
    return base_circuit(*ftlab.load('lab-l', revision='step-2214'), seed, prompts=200)

def run(arm, rate, seed, split, steps) -> dict:
    "All measures of one tuned model; the other arms are derived. The seed draws data, prompts, controls"
    v = entity_circuits(seed, rate=rate, steps=steps, prompts=400, masks=0,
                        groups=circuit(seed)).values
    out = {k.replace('.', '_'): x for k, x in v.items()}
    halfway = (v['base.accuracy'] + v['tuned.accuracy'])/2
    return out | dict(accuracy=v['tuned.accuracy'], gain=v['tuned.accuracy'] - v['base.accuracy'],
                      faithfulness=v['tuned.faithfulness'], circuit=v['tuned.circuit'],
                      patched=v['circuit.cmap'], halfway=halfway,
                      outside_above=v['outside.cmap'] - (v['base.accuracy'] + halfway)/2)

def derive(found) -> dict:
    "The base, the middle between base and tuned model, and random heads, from the same runs"
    of = found['tuned']
    return dict(base=dict(circuit=of['base_accuracy']), halfway=dict(patched=of['halfway']),
                random=dict(faithfulness=of['random_faithfulness'], patched=of['random_cmap']),
                outside=dict(patched=of['outside_cmap']),
                others=dict(patched=of['others_cmap']))

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
