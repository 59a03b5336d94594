import sys
import kernel_speed as ks
from rewrite.plugins import cuda_chain
plain = cuda_chain.variant
if __name__ == '__main__':
    ks.ceilings(); limits = ks.ceilings()
    print(len([r for r in ks.check_chains() if not r['right']]), 'wrong')
    for kb in (92, 160, 200):
        cuda_chain.RING = kb << 10
        print(kb, 'KB'); ks.time_chains(limits, (1, 8, 32, 64) if kb == 160 else (1, 32))
    cuda_chain.RING = 160 << 10
    for costs in ((0, 0), (4, 2)):
        cuda_chain.PIECE, cuda_chain.PART = costs; cuda_chain.best_grain.cache_clear()
        print(costs); ks.time_chains(limits, (1,))
