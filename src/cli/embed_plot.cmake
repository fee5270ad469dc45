# Writes the plotting script into a .cpp: cmake -DOUT=... -DSCRIPT=... -P embed_plot.cmake
file(READ "${SCRIPT}" content)
file(WRITE "${OUT}" "// Written by src/cli/embed_plot.cmake from python/flash_mla/plot.py.\n#include \"cli/plot_script.h\"\n\nnamespace flash_mla::cli {\nconst std::string_view kPlotScript = R\"__plot__(${content})__plot__\";\n}  // namespace flash_mla::cli\n")
