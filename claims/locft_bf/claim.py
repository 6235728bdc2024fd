"""Facts of the lab model are edited in one matrix, depth-first or breadth-first, in one place or another. Asked are the
edits, the same in other words, other facts, and 21 other skills"""
from functools import lru_cache
from statistics import fmean
import ftlab
from ftlab.adapters.editing.locft_bf import edit_scores, fact_edits, locft_bf
from ftlab.core.recipe import Recipe
from ftlab.evaluators.forgetting import flips, mean_flips
from ftlab.evaluators.old_sets import old_sets
from ftlab.lab.world import ASK, LabWorld

# BATCH: a thirtieth of the edits, as in the official files
MODEL, EDITS, PASSES, BATCH, OLD = 'lab-s', 150, 20, 5, 50
# arm -> recipe and rows in a batch; all read every edit PASSES times
ARMS = dict(breadth=(lambda: locft_bf(), BATCH), breadth_30=(lambda: locft_bf(), 30),
            breadth_1=(lambda: locft_bf(), 1),
            depth_1=(lambda: locft_bf(pipeline='depth'), 1),
            early=(lambda: locft_bf(0), BATCH), last=(lambda: locft_bf(3), BATCH),
            block=(lambda: locft_bf(module='block'), BATCH), full=(lambda: Recipe('full'), BATCH))

def edits_of(seed, split):
    "Other facts are edited in each seed; tuning and test have different seeds"
    return fact_edits(EDITS, seed, asked=200)

@lru_cache(8) # the test seeds, and more
def asked_before(seed, split):
    "The old questions, without the skill that edits are meant to change, and the base's scores"
    model, tok = ftlab.load(MODEL)
    sets = [s for s in old_sets(None, edits_of(seed, split).data(), model, tok, OLD, split, seed)
            if s.name != 'fact']
    return sets, {s.name: s.scores(model, tok) for s in sets}

def measured(model, tok, seed, split):
    "Shares of right answers, what was lost of the old skills, and the product by which rates are chosen"
    scores = edit_scores(model, tok, edits_of(seed, split))
    sets, before = asked_before(seed, split)
    lost = mean_flips([flips(before[s.name], s.scores(model, tok)) for s in sets])['lost']['share']
    out = {k: fmean(v) for k, v in scores.items()}
    out |= dict(gain=out['reliability'], forgetting=lost, locality=(out['near'] + out['far'])/2)
    return out | dict(worth=out['reliability']*(1 - lost),
                      items=dict(reliability=scores['reliability']))

def run(arm, rate, seed, split, steps):
    "Edit with one arm; `steps` is the number of passes"
    model, tok = ftlab.load(MODEL)
    if arm != 'base':
        recipe, size = ARMS[arm][0](), ARMS[arm][1]
        ftlab.fit(model, tok, edits_of(seed, split).data(), recipe, steps=steps*EDITS//size,
                  batch_size=size,
                  lr=rate, schedule='constant', clip=None, seed=seed, progress=False)
    return measured(model, tok, seed, split)

def identities() -> dict[str, bool]:
    "No edit says what the model knows or is asked about as a fact that stays; the pipelines differ in order alone"
    e, world = edits_of(20, 'test'), LabWorld(0)
    about = {w.format(p=p, a=a): (p, a) for w in ASK for p, a in world.facts}
    own = {r['prompt'] for r in e.rows}
    one, other = (locft_bf(pipeline=p) for p in ('breadth', 'depth'))
    return {'each edit is another fact':
                {about[r['prompt']] for r in e.rows} == e.changed and len(e.changed) == EDITS,
            'no edit says what the model knows':
                all(r['response'] != world.facts[about[r['prompt']]]
                    for r in (*e.rows, *e.paraphrase)),
            'no question beside an edit is an edit':
                not own & {r['prompt'] for r in (*e.near, *e.far, *e.paraphrase)},
            'the pipelines differ in their source alone':
                (one.select, one.objective, one.loop) == (other.select, other.objective, other.loop)
                and one.source != other.source}
