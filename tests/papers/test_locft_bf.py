"locft_bf: what its page cannot say about itself"
from ftlab import papers

ENTRY = next(e for e in papers.index() if e['key'] == 'locft_bf')


def test_it_is_the_paper_of_the_catalogue():
    row = papers.catalogue()['locft_bf']
    assert {k: ENTRY[k] for k in ('title', 'arxiv', 'family', 'home')}.items() <= row.items()


# FILL IN: a peer on the same tensors where one exists, the edges of its arguments, the errors that it gives
