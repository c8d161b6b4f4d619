# The CUDA kernels: every csrc/<op>/*.cu, in the object library moca_cuda. A source whose name ends
# in _sm90a.cu is compiled for 90a alone, and only where that is asked for: MOCA_HAS_SM90A says so.
include(${CMAKE_CURRENT_LIST_DIR}/cuda_archs.cmake)

set(MOCA_CUDA AUTO CACHE STRING "ON, OFF, or AUTO: where there is an nvcc")
set(MOCA_CUDA_ARCHS "" CACHE STRING "Architectures, such as 80;90a; see csrc/cuda_archs.cmake")
set(MOCA_NVCC_THREADS 1 CACHE STRING "Architectures that one nvcc compiles at a time")
option(MOCA_CUDA_STRICT "Warnings and register spills are errors; resources are reported")
set(MOCA_NVCC_OLDEST 12.8)  # the first with compressed binaries and Blackwell

# Sets `out` to the path of nvcc: the one that CUDACXX or CUDA_HOME names, else on the PATH, else of
# the packages nvidia-cuda-nvcc and so on in Python's site-packages, else where toolkits install.
function(moca_find_nvcc out)
  if(DEFINED ENV{CUDACXX})
    set(MOCA_NVCC "$ENV{CUDACXX}" CACHE FILEPATH "nvcc" FORCE)
  endif()
  foreach(home "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
    if(home)
      find_program(MOCA_NVCC nvcc NO_DEFAULT_PATH PATHS "${home}/bin")
    endif()
  endforeach()
  find_program(MOCA_NVCC nvcc)
  file(GLOB packaged "${Python_SITELIB}/nvidia/cu[0-9]*/bin")
  find_program(MOCA_NVCC nvcc PATHS ${packaged} /usr/local/cuda/bin NO_DEFAULT_PATH)
  set(${out} "${MOCA_NVCC}" PARENT_SCOPE)
endfunction()

function(moca_skip_cuda reason)
  if(MOCA_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA: not built, ${reason}")
  else()
    message(FATAL_ERROR "MOCA_CUDA=1: ${reason}")
  endif()
endfunction()

set(MOCA_CUDA_BUILT OFF)
if(NOT MOCA_CUDA)
  message(STATUS "CUDA: not built, MOCA_CUDA=0")
  return()
endif()

moca_find_nvcc(nvcc)
if(NOT nvcc)
  moca_skip_cuda("there is no nvcc on the PATH, in CUDA_HOME or in site-packages (docs/wheels.md)")
  return()
endif()
execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_says}")
set(nvcc_version ${CMAKE_MATCH_1})
if(NOT nvcc_version OR nvcc_version VERSION_LESS MOCA_NVCC_OLDEST)
  moca_skip_cuda("${nvcc} is ${nvcc_version}, expected ${MOCA_NVCC_OLDEST} or later")
  return()
endif()

moca_cuda_archs("${MOCA_CUDA_ARCHS}" cuda_archs)
set(gencode "")
execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE nvcc_archs)
foreach(arch ${cuda_archs})
  string(REGEX MATCH "^[0-9]+" number ${arch})
  if(NOT nvcc_archs MATCHES "sm_${number}")
    string(REGEX REPLACE "[\n ]+" " " nvcc_archs "${nvcc_archs}")
    message(FATAL_ERROR "MOCA_CUDA_ARCHS: nvcc ${nvcc_version} does not compile for ${arch}; it "
            "knows ${nvcc_archs}")
  endif()
  list(APPEND gencode "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
endforeach()

# The packages of nvcc keep libraries in lib, where nvcc itself does not look.
get_filename_component(nvcc_root ${nvcc} REALPATH)
get_filename_component(nvcc_root ${nvcc_root}/../.. REALPATH)
set(CMAKE_CUDA_COMPILER ${nvcc})
set(CMAKE_CUDA_FLAGS_INIT "-L${nvcc_root}/lib")
set(CMAKE_CUDA_ARCHITECTURES OFF)  # -gencode is given below: CMake need not know an architecture
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # so that the module imports where there is no driver
enable_language(CUDA)

set(cuda_flags --threads=${MOCA_NVCC_THREADS} --compress-mode=size
    --expt-relaxed-constexpr
    "SHELL:-Xcompiler -Wall,-Wextra,-Wno-unused-parameter")
if(MOCA_CUDA_STRICT)
  list(APPEND cuda_flags "SHELL:-Werror all-warnings" -Xcompiler=-Werror
       "SHELL:-Xptxas -v,--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error")
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*.cu)
set(hopper_sources ${cuda_sources})
list(FILTER hopper_sources INCLUDE REGEX "_sm90a\\.cu$")
list(FILTER cuda_sources EXCLUDE REGEX "_sm90a\\.cu$")

add_library(moca_cuda OBJECT ${cuda_sources})
target_compile_options(moca_cuda PRIVATE ${cuda_flags} ${gencode})
set(cuda_libraries moca_cuda)
if(hopper_sources AND "90a" IN_LIST cuda_archs)
  add_library(moca_cuda_sm90a OBJECT ${hopper_sources})
  target_compile_options(moca_cuda_sm90a PRIVATE ${cuda_flags}
                         "SHELL:-gencode arch=compute_90a,code=sm_90a")
  target_compile_definitions(moca_cuda PRIVATE MOCA_HAS_SM90A)
  list(APPEND cuda_libraries moca_cuda_sm90a)
endif()
list(JOIN cuda_archs "," cuda_arch_names)
foreach(library ${cuda_libraries})
  target_include_directories(${library} PRIVATE csrc)
  target_compile_definitions(${library} PRIVATE MOCA_CUDA_ARCHS="${cuda_arch_names}")
endforeach()
add_custom_target(cuda DEPENDS ${cuda_libraries})

set(MOCA_CUDA_BUILT ON)
message(STATUS "CUDA: ${cuda_archs} with nvcc ${nvcc_version} (${nvcc})")
