# One object library per instruction set level from the same sources; flags stay on those objects.
set(RFK_CPU_SOURCES
    csrc/cpu/flow_loss.cpp
    csrc/cpu/interpolate.cpp
    csrc/cpu/ode_step.cpp
    csrc/cpu/projected_update.cpp
    csrc/cpu/random.cpp
    csrc/cpu/table.cpp)

set(RFK_X86 0)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|i[3-6]86)$" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(RFK_X86 1)
endif()

# No fma contraction: every level must give the same bits. The other two flags let sqrt and selects vectorise; neither
# changes a value.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(RFK_MATH_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)
endif()

set(RFK_ATTENTION_SOURCES csrc/cpu/attention.cpp csrc/cpu/quantize.cpp)

function(rfk_add_isa level)
  rfk_add_isa_objects(cpu ${level} "${RFK_CPU_SOURCES}" ${ARGN})
endfunction()

# Attention has levels of its own: avx512 with VNNI, and amx.
function(rfk_add_attention_isa level)
  rfk_add_isa_objects(attention ${level} "${RFK_ATTENTION_SOURCES}" ${ARGN})
endfunction()

function(rfk_add_isa_objects room level sources)
  add_library(rfk_${room}_${level} OBJECT ${sources})
  target_include_directories(rfk_${room}_${level} PRIVATE csrc csrc/include)
  target_compile_definitions(rfk_${room}_${level} PRIVATE RFK_ISA_NAMESPACE=${level} RFK_X86=${RFK_X86})
  target_compile_options(rfk_${room}_${level} PRIVATE ${RFK_MATH_FLAGS} ${ARGN})
  if(OpenMP_CXX_FOUND)
    target_compile_options(rfk_${room}_${level} PRIVATE ${OpenMP_CXX_FLAGS})
  endif()
  target_sources(rfk_core PRIVATE $<TARGET_OBJECTS:rfk_${room}_${level}>)
endfunction()
