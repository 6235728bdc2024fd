// Without a server, and over text that is whole without this script.
document.documentElement.classList.remove('no-js')
// A page opened from the file system may not read others: then results are shown without an excerpt
if (location.protocol === 'file:' && typeof DOCUMENTATION_OPTIONS !== 'undefined') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false

// What scrolls sideways can be scrolled by keyboard
const reach = () => { for (const box of document.querySelectorAll('article pre, .cell_output, .table-wrapper, .math'))
  if (box.scrollWidth > box.clientWidth + 1) { box.tabIndex = 0; box.setAttribute('role', 'group'); box.setAttribute('aria-label', box.querySelector('table') ? 'Table, scrolls sideways' : 'Scrolls sideways') } }
addEventListener('load', reach); addEventListener('resize', reach)
// ... and an open side bar can be closed
addEventListener('keydown', e => { if (e.key === 'Escape') for (const box of document.querySelectorAll('.sidebar-toggle')) box.checked = false })

const element = (tag, text, set = {}) => Object.assign(document.createElement(tag), { textContent: text, ...set })

// table.filter: a search over all cells, a choice for each column with data-filter, sorting by a click on a heading
for (const table of document.querySelectorAll('table.filter')) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells], key = (row, i) => row.cells[i].dataset.sort ?? (row.cells[i].querySelector('a') ?? row.cells[i]).textContent
  for (const [what, role] of Object.entries({ 'thead, tbody': 'rowgroup', tr: 'row', td: 'cell', 'tbody th': 'rowheader', 'thead th': 'columnheader' })) for (const e of table.querySelectorAll(what)) e.setAttribute('role', role)
  table.setAttribute('role', 'table')
  const bar = element('div', '', { className: 'filters', role: 'search', ariaLabel: 'Filter the table' }), count = element('output', ''), tests = []
  const field = (name, input) => { const box = element('div', ''); input.id = `filter-${name.toLowerCase()}`; box.append(element('label', name, { htmlFor: input.id }), input); input.addEventListener('input', show); bar.append(box) }
  const show = () => { for (const row of rows) row.hidden = !tests.every(test => test(row)); count.textContent = `${rows.filter(r => !r.hidden).length} of ${rows.length}` }

  const words = element('input', '', { type: 'search' }); field('Search', words)
  tests.push(row => words.value.toLowerCase().split(/\s+/).every(w => row.textContent.toLowerCase().includes(w)))
  heads.forEach((head, i) => {
    if ('filter' in head.dataset) {
      const parts = row => head.dataset.filter === 'many' ? key(row, i).split(', ') : [row.cells[i].textContent], choice = element('select', '')
      for (const value of ['', ...new Set(rows.flatMap(parts).filter(Boolean).sort((a, b) => a.localeCompare(b, 'en', { numeric: true })))]) choice.append(element('option', value || 'all', { value }))
      field(head.textContent, choice); tests.push(row => !choice.value || parts(row).includes(choice.value))
    }
    const button = element('button', head.textContent, { type: 'button', title: 'Sort' }); head.replaceChildren(button)
    button.addEventListener('click', () => {
      const up = head.ariaSort !== 'ascending'; for (const h of heads) h.removeAttribute('aria-sort'); head.setAttribute('aria-sort', up ? 'ascending' : 'descending')
      rows.sort((a, b) => key(a, i).localeCompare(key(b, i), 'en', { numeric: true }) * (up ? 1 : -1)); table.tBodies[0].append(...rows)
    })
  })
  bar.append(count); table.closest('.table-wrapper').before(bar); show()
}
