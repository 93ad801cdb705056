"""The tables of the study's page, from its result.json: no figure in them is copied by hand.

    python tables.py result.json            prints them
    python tables.py result.json README.md  puts them between the page's two marks
"""
import json, sys
from pathlib import Path
from exp2nb.results import LABELS

BEGIN, END = '<!-- tables.py begins -->', '<!-- tables.py ends -->'
def percent(x)->str: return '–' if x is None else f'{100*x:.1f}'

def points(x)->str: return '–' if x is None else f'{100*x:+.1f}'.replace('-', '−')

def span(low, high)->str: return f'{points(low)} to {points(high)}'

def gap(row:dict, of:str='')->list:
    "Two cells: a difference in points, and its interval."
    return [points(row[f'{of}difference']), span(row[f'{of}low'], row[f'{of}high'])]

GAP = ['points', '95 % interval']   # their head

def table(head:list, rows:list)->str:
    "A table in Markdown."
    lines = [head, ['---']*len(head), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)

def mean(xs): return sum(xs)/len(xs) if xs else None

def all_arms(r:dict)->str:
    "One row an arm and basis, at the full budget."
    ends = {(e['arm'], e['match_on'], e['checkpoint'], e['decoding']): e for e in r['tables']['ends'] if e['budget']==1}
    gains = {g['arm']: g for g in r['tables']['gains']}
    rows = []
    for (arm, basis, checkpoint, decoding), e in ends.items():
        if (checkpoint, decoding)!=('end', 'greedy'): continue
        own = basis=='model'
        other = [r['arms'][arm][t]['mean'] for t in ('spellingbee', 'choices')] if own else [None, None]
        best, sampled = ends.get((arm, basis, 'best_dev', 'greedy'), {}), ends.get((arm, basis, 'end', 'sampled'), {})
        g = gains.get(arm, {}) if own else {}
        rows.append([LABELS[arm] + ('' if own else f', on `{basis}`'), e['seeds'], percent(e['accuracy']), percent(sampled.get('accuracy')),
                     percent(best.get('accuracy')), *map(percent, other), f"{e['flops']/1e12:.2f}" if e['flops'] else '–',
                     f"{g['executed']:.2f}" if g.get('executed') else '–', f"{g['kl']:.3f}" if g.get('kl') is not None else '–'])
    head = ['arm', 'seeds', 'greedy', 'sampled', 'best on dev', 'spelling', 'choices', 'TFLOPs billed', 'executed, of billed', 'KL to SFT']
    return table(head, rows)

def each_seed(r:dict)->str:
    "The endpoint of each seed, in percent, and RL − SFT+ in points."
    ends = {(e['arm'], e['match_on']): e['per_seed'] for e in r['tables']['ends']
            if (e['budget'], e['checkpoint'], e['decoding'])==(1, 'end', 'greedy')}
    sft, rl, model, executed = (ends[k] for k in (('sft', 'model'), ('rl', 'model'), ('sft_plus', 'model'), ('sft_plus', 'executed')))
    rows = [[s, *map(percent, four), points(four[1]-four[2]), points(four[1]-four[3])]
            for s, four in zip(r['seeds'], zip(sft, rl, model, executed, strict=True), strict=True)]
    means = [mean(x) for x in (sft, rl, model, executed)]
    rows.append(['mean', *map(percent, means), points(means[1]-means[2]), points(means[1]-means[3])])
    both = [r['verdict']['by_basis'][basis]['interval'] for basis in ('model', 'executed')]
    rows.append(['95 % interval', '', '', '', '', *(span(*x) for x in both)])
    return table(['seed', 'SFT', 'RL', 'SFT+ on `model`', 'SFT+ on `executed`', 'RL − SFT+ on `model`', 'on `executed`'], rows)

def besides(r:dict)->str:
    "What has no part in the verdict."
    rows = [[x['what'], x['seeds'], *gap(x)] for x in r['tables']['also']]
    for x in r['tables']['benchmarks']:
        contrast = ' − '.join(LABELS[arm] for arm in x['contrast'].split('_vs_'))
        rows.append([f"{x['task']}: {contrast}", x['seeds'], *gap(x)])
    return table(['what', 'seeds', *GAP], rows)

def ladder(r:dict)->str:
    "Gains over SFT, and what was forgotten: the other tasks together."
    rows = [[LABELS[g['arm']], g['seeds'], *gap(g), *gap(g, 'other_')] for g in r['tables']['gains']]
    return table(['arm', 'seeds', 'gain over SFT', '95 % interval', 'other tasks', '95 % interval'], rows)

def neighbours(r:dict)->str:
    "Each step of the ladder against the one before it."
    rows = [[f"{LABELS[x['arm']]} − {LABELS[x['after']]}", x['seeds'], *gap(x), f"{x['p_holm']:.2g}" if x['enough'] else '–']
            for x in r['tables']['neighbours']]
    return table(['step', 'seeds', *GAP, "p, Holm's"], rows)

def along(rows:list, head:str, name)->str:
    "RL − SFT+ over budgets or starting points."
    cells = [[name(x), x['seeds'], *(percent(x[arm]) for arm in ('sft', 'rl', 'sft_plus')), *gap(x)] for x in rows]
    return table([head, 'seeds', 'SFT', 'RL', 'SFT+', 'RL − SFT+', '95 % interval'], cells)

def page(r:dict)->str:
    "All tables that the result has rows for."
    t = r['tables']
    parts = [('All arms', all_arms(r)), ('Each seed', each_seed(r)), ('Besides the endpoint', besides(r))]
    if len(t['gains']) > 2: parts += [('The ladder', ladder(r)), ('Step by step', neighbours(r))]
    if len(t['budgets']) > 1: parts.append(('Other budgets', along(t['budgets'], 'share of the budget', lambda x: f"{x['budget']:g}")))
    if len(t['starts']) > 1:
        start = lambda x: f"{percent(x['sft_accuracy'])} %"
        parts.append(('Other starting points', along(t['starts'], 'SFT starts at', start)))
    return '\n\n'.join(f'### {title}\n\n{text}' for title, text in parts)

def into(text:str, tables:str)->str:
    "A page with the tables between its marks."
    before, _, rest = text.partition(BEGIN)
    return f'{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}'

if __name__=='__main__':
    tables = page(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8')))
    if len(sys.argv)==2: print(tables)
    else: Path(sys.argv[2]).write_text(into(Path(sys.argv[2]).read_text(encoding='utf-8'), tables), encoding='utf-8')
