import kernel_speed as ks
from rewrite.plugins import cuda_chain
if __name__ == '__main__':
    ks.ceilings(); limits = ks.ceilings()
    print(len([r for r in ks.check_chains() if not r['right']]), 'wrong', flush=True)
    for ring, window in ((160, 8), (160, 16), (110, 8), (205, 8)):
        cuda_chain.RING, cuda_chain.WINDOW = ring << 10, window
        print('ring', ring, 'window', window); ks.time_chains(limits, (1, 2, 4, 8, 16) if (ring, window) == (160, 8) else (1, 8))
