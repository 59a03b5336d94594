import sys
import kernel_speed as ks
from rewrite.plugins import cuda_chain
plain = cuda_chain.variant
if __name__ == '__main__':
    ks.ceilings(); limits = ks.ceilings()
    print(len([r for r in ks.check_chains() if not r['right']]), 'wrong')
    for window in (2, 3, 4, 6, 8, 12):
        cuda_chain.WINDOW = window
        print('window', window); ks.time_chains(limits, (1, 32))
    for window in (4, 8):
        cuda_chain.RING = 200 << 10
        cuda_chain.WINDOW = window
        print('ring 200 window', window); ks.time_chains(limits, (1, 32))
