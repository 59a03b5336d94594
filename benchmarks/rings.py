import kernel_speed as ks
from rewrite.plugins import cuda_chain
if __name__ == '__main__':
    ks.ceilings(); limits = ks.ceilings()
    for kb in (112, 160, 210):
        cuda_chain.RING = kb << 10
        print(kb, 'KB'); ks.time_chains(limits)
