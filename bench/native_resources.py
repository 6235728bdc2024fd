"""What the CUDA kernels take of a GPU, by nvcc's own account.

Registers a thread, and bytes spilled because registers ran out.

    python bench/native_resources.py            # writes bench/results/native_resources.json; needs nvcc, no GPU"""
import json, re, subprocess, tempfile
from pathlib import Path
from ftlab.native import extension

def main():
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for _, report in extension.compile_cuda(tmp):
            text = subprocess.run(['c++filt'], input=report, capture_output=True, text=True,
                                  check=True).stdout
            for name, arch, body in re.findall(r"entry function '(?:void )?(.*?)\(.*?' for "
                                               r"'(sm_\d+)'(.*?registers)", text, re.S):
                spilled = sum(map(int, re.findall(r'(\d+) bytes spill', body)))
                rows.append(dict(kernel=name, arch=arch,
                                 registers=int(re.search(r'Used (\d+)', body)[1]), spilled=spilled))
    Path('bench/results/native_resources.json').write_text(json.dumps(rows, indent=1) + '\n')
    print(*rows, sep='\n')

if __name__ == '__main__':
    main()
