"""The tables of a record's page, from the files beside it: no figure in them is copied by hand.

    python tables.py FOLDER     puts them between the marks of FOLDER/README.md

FOLDER holds result.json and, where they were made, first_form.json (the result of the plan's first form), rl_rates.json (rl_rates.py)
and longer.json (longer.py).
"""
import json, sys
from pathlib import Path
from exp2nb.ladder import FIRST, LADDER
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

def verdict(r:dict)->str:
    "The rule's code, its sentence, and what stands beside it."
    v = r['verdict']
    speaks = v['hypothesis'] and f"It speaks for the hypothesis that {v['hypothesis']}."
    said = [f"**`{v['code']}`**: {v['sentence']}", speaks, *v['notes'], f"Over SFT: {v['premise']['words']}.", v['needed']]
    return '\n'.join(f'- {x}' for x in said if x)

def by_basis(r:dict, first:dict=None)->str:
    "RL − SFT+ on each way to count. `first`: the result with SFT+ on `executed` at the plan's first rates."
    forms = [(f'`{basis}`', row) for basis,row in r['verdict']['by_basis'].items()]
    if first: forms.append(('`executed`, first form', first['verdict']['by_basis']['executed']))
    rows = [[name, x['seeds'], *gap(dict(difference=x['difference'], low=x['interval'][0], high=x['interval'][1])),
             span(*x['interval_90']), f"`{x['code']}`"] for name,x in forms]
    text = table(['matched on', 'seeds', *GAP, '90 % interval', 'alone the rule says'], rows)
    return text + (f"\n\nWith the first form the verdict would be `{first['verdict']['code']}`." if first else '')

def measured(r:dict, arm, name):
    "A mean of the table of measures; None where it was not taken."
    return next((x['value'] for x in r['tables']['beside'] if (x['arm'], x['measure'])==(arm, name)), None)

def gained(r:dict)->list:
    "The rows of gains: the ladder's arms first, in its order; SFT+ on another basis after SFT+."
    steps = list(LADDER)
    return sorted(r['tables']['gains']+r['tables']['other_bases'], key=lambda x: steps.index(x['arm']) if x['arm'] in steps else len(steps))

def named(arm, basis)->str: return LABELS[arm] + f', on `{basis}`'*(basis!='model')

def all_arms(r:dict)->str:
    "One row an arm and basis, at the full budget."
    ends = {(e['arm'], e['match_on'], e['checkpoint'], e['decoding']): e for e in r['tables']['ends'] if e['budget']==1}
    rows = []
    for (arm, basis, checkpoint, decoding), e in ends.items():
        if (checkpoint, decoding)!=('end', 'greedy'): continue
        other = [e['others'].get(t) for t in ('spellingbee', 'choices')]
        best, sampled = ends.get((arm, basis, 'best_dev', 'greedy'), {}), ends.get((arm, basis, 'end', 'sampled'), {})
        cut = next((g['cut'] for g in gained(r) if (g['arm'], g['match_on'])==(arm, basis)), None)
        if arm=='sft': cut = 1-measured(r, 'sft', 'answer stops')
        rows.append([named(arm, basis), e['seeds'], percent(e['accuracy']), percent(sampled.get('accuracy')),
                     percent(best.get('accuracy')), *map(percent, other), percent(cut)])
    return table(['arm', 'seeds', 'greedy', 'sampled', 'best on dev', 'spelling', 'choices', 'answers cut'], rows)

def paid(r:dict)->str:
    "What each arm was billed for, in TFLOPs, how it was spent, and how far it led."
    stages = [s for s in ('rollout', 'update', 'sft', 'optimizer') if any(s in g['kinds'] for g in gained(r))]
    def number(x, digits): return '–' if x is None else f'{x:.{digits}f}'
    rows = [[named(g['arm'], g['match_on']), g['seeds'], f"{sum(g['kinds'].values())/1e12:.2f}",
             *(f"{g['kinds'].get(s, 0)/1e12:.2f}" for s in stages), f"{g['executed']:.2f}", number(g['steps'], 0), number(g['passes'], 2),
             '–' if g['missed'] is None else f"{100*g['missed']:.2g} %", number(g['kl'], 3), number(g['entropy'], 3)] for g in gained(r)]
    head = ['arm', 'seeds', 'billed', *stages, 'executed, of billed', 'steps', 'passes', 'budget missed by', 'KL to SFT', 'entropy']
    return table(head, rows)

def tries(r:dict)->str:
    "pass@k and majority@k of answers at temperature 1, in percent."
    ks = sorted({x['k'] for x in r['tables']['tries']})
    got = {(x['arm'], x['measure'], x['k']): x['value'] for x in r['tables']['tries']}
    arms = [a for a in LABELS if (a, 'pass', 1) in got]
    rows = [[LABELS[a], *(percent(got.get((a, m, k))) for m in ('pass', 'majority') for k in ks)] for a in arms]
    return table(['arm', *(f'pass@{k}' for k in ks), *(f'majority@{k}' for k in ks)], rows)

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

def gains(r:dict)->str:
    "Gains over SFT, and what was forgotten: each other benchmark, and their mean."
    rows = gained(r)
    tasks = list(rows[0]['tasks'])
    def lost(g, t):
        d = g['tasks'].get(t)
        return f"{points(d['difference'])} ({span(d['low'], d['high'])})" if d else '–'
    cells = [[named(g['arm'], g['match_on']), g['seeds'], *gap(g), *(lost(g, t) for t in tasks), *gap(g, 'other_')] for g in rows]
    return table(['arm', 'seeds', 'gain over SFT', '95 % interval', *tasks, 'mean of these', '95 % interval'], cells)

def neighbours(r:dict)->str:
    "Each step of the ladder against the one before it."
    rows = [[f"{LABELS[x['arm']]} − {LABELS[x['after']]}", x['seeds'], *gap(x), f"{x['p_holm']:.2g}" if x['enough'] else '–']
            for x in r['tables']['neighbours']]
    return table(['step', 'seeds', *GAP, "p, Holm's"], rows)

def splits(r:dict)->str:
    "The budget's split: gain over SFT against the share that went to SFT+, and how far each share is from the highest mean."
    rows = [[FIRST[x['first']], f"{100*x['share']:.0f} %", x['seeds'], *gap(x), *(['highest', '', ''] if x['best'] else
             [*gap(x, 'to_best_'), x['to_best_seeds']])] for x in r['tables']['splits']]
    return table(['order', 'on SFT+', 'seeds', 'gain over SFT', '95 % interval', 'to the highest', '95 % interval', 'seeds'], rows)

def solutions(r:dict)->str:
    "SFT+ with several worded solutions a problem: its gain, and its difference to RL."
    rows = [[x['solutions'], x['seeds'], *gap(x), *gap(x, 'to_rl_')] for x in r['tables']['solutions']]
    return table(['solutions a problem', 'seeds', 'gain over SFT', '95 % interval', 'SFT+ − RL', '95 % interval'], rows)

def along(rows:list, head:str, name, crossing)->str:   # '' for a single point
    "RL − SFT+ over budgets or starting points, and where they cross."
    if len(rows) < 2: return ''
    cells = [[name(x), x['seeds'], *(percent(x[arm]) for arm in ('sft', 'rl', 'sft_plus')), *gap(x)] for x in rows]
    text = table([head, 'seeds', 'SFT', 'RL', 'SFT+', 'RL − SFT+', '95 % interval'], cells)
    return text + (f"\n\nCrossing: {crossing['sentence']}." if crossing else '')

def other_rates(check:dict)->str:
    "RL at other rates than the study's, against the study's arms."
    def of(x):
        if x['arm']=='rl': return 'RL, at the rates of tuning'
        return LABELS[x['arm']] + f", on `{x['match_on']}`"*bool(x['match_on'])
    def bill(x): return '–' if x['bill'] is None else f"{points(x['bill'])} %"
    rows = [[of(x), x['seeds'], *gap(x), f"`{x['code']}`" if x['code'] else '–', bill(x)] for x in check['rows']]
    head = ["RL at the preset's rates minus", 'seeds', *GAP, 'alone the rule says', 'its bill, against theirs, at most']
    scores = ', '.join(f"{t} {percent(x)} %" for t,x in check['accuracy'].items())
    lost = '; '.join(f"{t} {points(x['difference'])} ({span(x['low'], x['high'])})" for t,x in check['others'].items())
    def learned(x):
        rewards = [percent(v) for v in x['reward']] if x['reward'] else ['–']*2
        return [of(x) if x['study'] else "RL, at the preset's rates", *rewards, percent(x['zero_advantage']), percent(x['dev'])]
    training = table(['in training', 'reward, first ten steps', 'last ten', 'groups without an advantage', 'dev, at the end'],
                     map(learned, check['training']))
    return (f"{table(head, rows)}\n\nIt scored: {scores}; against SFT: {lost}; KL to SFT {check['kl']:.3f} nats a token.\n\n{training}")

def longer_answers(check:dict)->str:
    "Accuracy and cut answers at two lengths of answer, and at the longer one the differences to SFT and RL."
    def of(x, key): return gap(x[key]) if x[key] else ['–', '']
    shares = 'before', 'accuracy', 'cut_before', 'cut'
    rows = [[LABELS[x['arm']], x['seeds'], *(percent(x[k]) for k in shares), *of(x, 'over_sft'), *of(x, 'to_rl')] for x in check['rows']]
    lengths = [f'{name}, {check[length]} tokens' for name in ('greedy', 'cut') for length in ('before', 'tokens')]
    return table(['arm', 'seeds', *lengths, 'over SFT', '95 % interval', 'minus RL', '95 % interval'], rows)

def page(r:dict, first:dict=None, check:dict=None, longer:dict=None)->str:
    "All tables that the result has rows for. `first`: the result of the plan's first form; `check`, `longer`: of those two scripts."
    t = r['tables']
    between = '\n'.join(f'- {said}' for said in r['between'])
    start = lambda x: f"{percent(x['sft_accuracy'])} %"
    share = lambda x: f"{x['budget']:g}"
    parts = {
        'The verdict': verdict(r), 'Ways to count': by_basis(r, first), 'All arms': all_arms(r), 'Each seed': each_seed(r),
        'Gains and losses': gains(r), 'What was paid, and how far it led': paid(r), 'Besides the endpoint': besides(r),
        "After the fact: RL at the preset's rates": other_rates(check) if check else '',
        'More tries': tries(r) if t['tries'] else '', 'The ladder, step by step': neighbours(r) if len(t['neighbours']) > 1 else '',
        'Splits of the budget': splits(r) if t['splits'] else '', 'Worked solutions': solutions(r) if t['solutions'] else '',
        'With longer answers': longer_answers(longer) if longer else '', 'What lies between, in words': between,
        'Other budgets': along(t['budgets'], 'share of the budget', share, r['crossover'].get('budget')),
        'Other starting points': along(t['starts'], 'SFT starts at', start, r['crossover'].get('start'))}
    return '\n\n'.join(f'### {title}\n\n{text}' for title, text in parts.items() if text)

def into(text:str, tables:str)->str:
    "A page with the tables between its marks."
    if BEGIN not in text or END not in text: raise SystemExit(f'the page lacks the marks: put {BEGIN} and {END} where the tables belong')
    before, _, rest = text.partition(BEGIN)
    return f'{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}'

def of_folder(folder)->str:
    "The tables of a record's folder."
    read = lambda name: json.loads((folder/name).read_text(encoding='utf-8')) if (folder/name).exists() else None
    return page(*map(read, ('result.json', 'first_form.json', 'rl_rates.json', 'longer.json')))

if __name__=='__main__':
    folder = Path(sys.argv[1])
    text = into((folder/'README.md').read_text(encoding='utf-8'), of_folder(folder))
    (folder/'README.md').write_text(text, encoding='utf-8')
