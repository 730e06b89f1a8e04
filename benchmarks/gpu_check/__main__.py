from benchmarks.gpu_check.program import main

main()
