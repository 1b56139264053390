# `cmake --install`: the shared library with the C ABI, a static one with the C ABI and the C++ API,
# headers, the CMake package, the pkg-config file, the command line and its manual pages.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# One archive of all our objects, so that a user links one thing.
set(archived "")
foreach(part memory kernels transfer selectors runtime)
  list(APPEND archived $<TARGET_OBJECTS:kvtier_${part}>)
endforeach()
add_library(kvtier_static STATIC ${archived} $<TARGET_OBJECTS:kvtier_c_api>)
set_target_properties(kvtier_static PROPERTIES
  OUTPUT_NAME kvtier EXPORT_NAME kvtier_static LINKER_LANGUAGE CXX)
target_link_libraries(kvtier_static PUBLIC fmt::fmt TBB::tbb OpenSSL::Crypto Threads::Threads)
target_compile_features(kvtier_static INTERFACE cxx_std_20)
# `#include <kvtier.h>` for C; `#include "runtime/runtime.h"` for C++, as in the sources.
target_include_directories(kvtier_static INTERFACE
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/kvtier>)
set_target_properties(kvtier_shared PROPERTIES EXPORT_NAME kvtier)
target_include_directories(kvtier_shared INTERFACE
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/runtime>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

install(TARGETS kvtier_shared EXPORT kvtierTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS kvtier_static EXPORT kvtierStaticTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES runtime/kvtier.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY memory kernels transfer selectors runtime
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvtier
        FILES_MATCHING PATTERN "*.h" PATTERN "*-inl.h" EXCLUDE PATTERN "python" EXCLUDE
        PATTERN "install" EXCLUDE)

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/kvtier)
set(KVTIER_CUDA_COMPONENT FALSE)
if(KVTIER_CUDA)
  set(KVTIER_CUDA_COMPONENT TRUE)
endif()
configure_package_config_file(runtime/install/kvtierConfig.cmake.in
  ${PROJECT_BINARY_DIR}/kvtierConfig.cmake INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvtierConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kvtierConfig.cmake
              ${PROJECT_BINARY_DIR}/kvtierConfigVersion.cmake
        DESTINATION ${package_folder})
install(EXPORT kvtierTargets NAMESPACE kvtier:: DESTINATION ${package_folder})
install(EXPORT kvtierStaticTargets NAMESPACE kvtier:: DESTINATION ${package_folder})

# Written at install time, when the prefix is known.
install(CODE "
  set(CMAKE_INSTALL_LIBDIR \"${CMAKE_INSTALL_LIBDIR}\")
  set(CMAKE_INSTALL_INCLUDEDIR \"${CMAKE_INSTALL_INCLUDEDIR}\")
  set(PROJECT_VERSION \"${PROJECT_VERSION}\")
  set(PROJECT_DESCRIPTION \"${PROJECT_DESCRIPTION}\")
  configure_file(\"${PROJECT_SOURCE_DIR}/runtime/install/kvtier.pc.in\"
                 \"${PROJECT_BINARY_DIR}/kvtier.pc\" @ONLY)
  file(INSTALL \"${PROJECT_BINARY_DIR}/kvtier.pc\"
       DESTINATION \"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/pkgconfig\")")

if(KVTIER_TOOLS)
  install(TARGETS kvtier RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  # Manual pages from what --help prints, so that the two cannot disagree.
  find_program(HELP2MAN help2man)
  if(HELP2MAN)
    set(pages "")
    foreach(verb "" inspect replay simulate sweep bench selectors)
      set(page kvtier)
      set(help "--help")
      set(name "tiered KV cache: replay, simulate, measure")
      if(verb)
        set(page kvtier-${verb})
        set(help "${verb} --help")
        set(name "kvtier ${verb}")
      endif()
      set(file ${PROJECT_BINARY_DIR}/man/${page}.1)
      add_custom_command(OUTPUT ${file}
        COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/man
        COMMAND ${HELP2MAN} --no-info --name=${name} --help-option=${help} --output=${file}
                $<TARGET_FILE:kvtier>
        DEPENDS kvtier VERBATIM)
      list(APPEND pages ${file})
    endforeach()
    add_custom_target(kvtier_manual ALL DEPENDS ${pages})
    install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
  endif()
endif()

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME kvtier)
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
set(CPACK_PACKAGE_CONTACT "kvtier maintainers")
set(CPACK_PACKAGE_FILE_NAME kvtier_${PROJECT_VERSION}_${CMAKE_SYSTEM_PROCESSOR})
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
include(CPack)
