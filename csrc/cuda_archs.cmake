# Which GPU architectures to compile for. Alone, it prints what a list means:
#   cmake -DMOCA_CUDA_ARCHS="80;90a" -P csrc/cuda_archs.cmake
cmake_policy(VERSION 3.24)

# One binary of a plain architecture also runs on later ones of its generation (80 on 86 and 89, 100
# on 103, 120 on 121). 90a is Hopper with its own matrix instructions, and runs nowhere else.
set(MOCA_CUDA_DEFAULT_ARCHS 80 90a 100 120)

# Sets `out` to the list that `wanted` names: architectures such as 80, 90a or 100f, or `native`.
# Separators are semicolons, commas or spaces. An empty list is native, and where there is no GPU
# the default above.
function(moca_cuda_archs wanted out)
  string(REGEX REPLACE "[;, ]+" ";" wanted "${wanted}")
  list(REMOVE_ITEM wanted "")
  if(NOT wanted)
    moca_native_archs(archs)
    if(NOT archs)
      set(archs ${MOCA_CUDA_DEFAULT_ARCHS})
    endif()
    set(${out} ${archs} PARENT_SCOPE)
    return()
  endif()
  set(archs "")
  foreach(arch ${wanted})
    if(arch STREQUAL "native")
      moca_native_archs(native)
      if(NOT native)
        message(FATAL_ERROR "MOCA_CUDA_ARCHS: native, but nvidia-smi finds no GPU from sm_80 on")
      endif()
      list(APPEND archs ${native})
    elseif(arch MATCHES "^([89][0-9]|1[0-9][0-9]|(9|1[0-9])[0-9]a|1[0-9][0-9]f)$")
      list(APPEND archs ${arch})
    else()
      message(FATAL_ERROR "MOCA_CUDA_ARCHS: expected architectures from 80 on, such as \"80\" or "
              "\"80;90a;100f;120\", or \"native\", got \"${arch}\"")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES archs)
  set(${out} ${archs} PARENT_SCOPE)
endfunction()

# The architectures of this machine's GPUs, from 80 on.
function(moca_native_archs out)
  set(archs "")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  RESULT_VARIABLE failed OUTPUT_VARIABLE found ERROR_QUIET)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${found}")
    foreach(capability ${capabilities})
      string(REPLACE "." "" arch ${capability})
      if(arch EQUAL 90)
        list(APPEND archs 90a)
      elseif(arch GREATER_EQUAL 80)
        list(APPEND archs ${arch})
      endif()
    endforeach()
    list(REMOVE_DUPLICATES archs)
  endif()
  set(${out} ${archs} PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  moca_cuda_archs("${MOCA_CUDA_ARCHS}" archs)
  message("${archs}")
endif()
