"""Full fine-tuning seen after half of its steps: an arm that is known to be worse, at no cost"""


def derive(found):
    half = found['full']['path'][-2]
    return dict(halfway=dict(gain=half['gain'], forgetting=half['forgetting'], error=None))
