// How the search orders what it finds: a guide before the reference, where both have the words only in their text.
// Sphinx counts 15 for the words of a title and 5 for those of a text, whatever the page.
const FOLDERS = { "start/": 3, "guides/": 3, "explain/": 2, "generated/cli/": -2 };
const PAGES = { "benchmarks": -3, "generated/figures": -3, "generated/examples": -3, "generated/contributing": -3 };

var Scorer = {
  score: ([page, , , , score]) => {
    const folder = Object.keys(FOLDERS).find((name) => page.startsWith(name));
    return score + (PAGES[page] ?? FOLDERS[folder] ?? 0);
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
