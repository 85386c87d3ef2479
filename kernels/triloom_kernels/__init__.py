"""Operations of triloom: needs torch, and Triton where kernels run; nothing of the runtime and no process groups.

A module named after an operation holds its eager form (:mod:`rms_norm`, :mod:`swiglu`, :mod:`rope` ...), which is the
reference of its kernels, and says which module has them (:mod:`normalising`, :mod:`gated`, :mod:`turning` ...). The
functions of both have the same arguments and results; :mod:`table` chooses by device.
"""
