from benchmarks.kernels_static.program import main

main()
